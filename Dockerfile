# gn_det on a CPU or on NVIDIA GPUs.
#
#   docker build -t gn-det .
#   docker run --rm -v "$PWD:/data" gn-det predict --weights model_best.pth photos/ --output out/
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" gn-det train --config gn_fpn.yaml ...
#
# A smaller image without GPU libraries: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.12-slim
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision
COPY . /src
RUN pip install --no-cache-dir "/src[video,hub]" && rm -rf /src
RUN gn-det doctor
# Files that are written belong to whoever runs the container, if it is started with --user.
ENV FVCORE_CACHE=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /data
ENTRYPOINT ["gn-det"]
