"""Every configuration key, its default and what it does.

Names and defaults are Detectron2's, so its YAML files load unchanged; the keys that only gn_det has stand in
:func:`add_gn_keys` (the Detectron2 plugin adds the same ones). Three defaults differ on purpose:
``MODEL.DEVICE`` is ``"auto"``, ``MODEL.ROI_HEADS.NUM_CLASSES`` is 0 (= taken from the data set) and
``DATALOADER.NUM_WORKERS`` is capped by the number of cores at run time.
"""

from __future__ import annotations

from fvcore.common.config import CfgNode as CN


def get_cfg() -> CN:
    """A fresh, mutable config with all keys at their defaults."""
    cfg = CN()
    # Version of Detectron2's key naming; only 2 exists in the wild today.
    cfg.VERSION = 2
    # Folder for checkpoints, metrics.json, TensorBoard events and evaluation results.
    cfg.OUTPUT_DIR = "./output"
    # Seed of initialisation, sampling and augmentation; negative: drawn at start and printed.
    cfg.SEED = -1
    # Let cuDNN search algorithms; pays only when image sizes hardly vary.
    cfg.CUDNN_BENCHMARK = False
    # torch.set_float32_matmul_precision: "", "highest", "high" or "medium"; "" leaves torch's own.
    cfg.FLOAT32_PRECISION = ""
    # Not implemented by the embedded engine: pictures during training.
    cfg.VIS_PERIOD = 0
    # Detectron2's scratch space for experiments; unused here.
    cfg.GLOBAL = CN()
    cfg.GLOBAL.HACK = 1.0
    _add_model(cfg)
    _add_rpn(cfg)
    _add_roi_heads(cfg)
    _add_not_implemented(cfg)
    _add_data(cfg)
    _add_solver(cfg)
    _add_test(cfg)
    add_gn_keys(cfg)
    # "cuda", "cuda:1", "cpu", or "auto": a GPU if there is one.
    cfg.MODEL.DEVICE = "auto"
    # 0: the number of categories in the training json.
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    return cfg


def add_gn_keys(cfg: CN) -> None:
    """Add the keys that Detectron2 does not have to a config that has all of Detectron2's."""
    cfg.MODEL.GN = type(cfg)()
    # Groups of every GN layer (the paper's default, Table 3).
    cfg.MODEL.GN.NUM_GROUPS = 32
    # > 0: fixed channels per group instead (groups = channels // CHANNELS_PER_GROUP), the paper's other division.
    cfg.MODEL.GN.CHANNELS_PER_GROUP = 0
    # Added to the variance.
    cfg.MODEL.GN.EPS = 1e-5
    # Kernels that fuse GN, add and ReLU: "on" where they can run (a GPU with Triton), "off" never, "auto" where they
    # were measured to be better than torch's: nowhere yet. Same weights, same results within rounding. Quote "on" and
    # "off" in YAML, where the bare words mean true and false.
    cfg.MODEL.GN.FUSED = "auto"
    # Keep one activation less for each GN + ReLU in training, and compute it again in the backward pass.
    cfg.MODEL.GN.RECOMPUTE = False
    # Filled at run time from the data set, stored in checkpoints, used at predict.
    cfg.MODEL.CLASS_NAMES = ()
    # Own data in COCO format; both set: they take the place of DATASETS.TRAIN / DATASETS.TEST.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.VAL_JSON = ""
    cfg.DATASETS.VAL_IMAGES = ""
    # How gray pictures of 16 or 32 bits or floats become 8 bits; pictures of 8 bits are never changed. "": refuse them;
    # "LOW,HIGH" (such as "0,4095"): LOW becomes black, HIGH white; "full": 0 to 65535; "percentiles": of each picture,
    # its 0.5th becomes black and its 99.5th white.
    cfg.INPUT.BIT_DEPTH = ""
    # Larger pictures are refused: a small file can unpack to any size. Pillow's own limit.
    cfg.INPUT.MAX_PIXELS = 178_956_970
    # Broken images and annotations that are listed and dropped; one more and the run refuses to start.
    cfg.DATALOADER.MAX_BAD = 10
    # Micro-batches summed into one optimizer step; IMS_PER_BATCH counts them all.
    cfg.SOLVER.ACCUMULATE = 1
    # > 0: MAX_ITER becomes this many passes over the training set, the other iteration counts keep their proportion.
    cfg.SOLVER.EPOCHS = 0.0
    # > 0: the batch that BASE_LR and the schedule were written for; another IMS_PER_BATCH scales lr linearly and
    # iterations inversely.
    cfg.SOLVER.REFERENCE_BATCH = 0
    # Keys taken literally by the scaling above. Overrides on the command line are added to it.
    cfg.SOLVER.NO_RESCALE = ()
    # Autocast type with SOLVER.AMP.ENABLED: "bf16" or "fp16" (with loss scaling).
    cfg.SOLVER.AMP.DTYPE = "bf16"
    # A moving average of the weights beside them; it is what is evaluated and saved as the model. DECAY is what stays
    # of the average at each step (less in the first steps).
    cfg.SOLVER.EMA = type(cfg)()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.999
    # > 0: evaluate, save and end in time to be done within so many hours of this start; --resume goes on.
    cfg.SOLVER.MAX_HOURS = 0.0
    # How many periodic checkpoints stay on disk (best and final are kept besides).
    cfg.SOLVER.CHECKPOINT_KEEP = 3
    # Detections of a class that count in an image (COCOeval's maxDets); raise it together with DETECTIONS_PER_IMAGE
    # where images have more objects than that.
    cfg.TEST.MAX_DETS = 100
    # Stop after this many evaluations without a better TEST.BEST_METRIC; 0: never.
    cfg.TEST.PATIENCE = 0
    # What model_best.pth is chosen by; without a mask head "segm/AP" means "bbox/AP".
    cfg.TEST.BEST_METRIC = "segm/AP"


def _add_model(cfg: CN) -> None:
    cfg.MODEL = CN()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.DEVICE = "cuda"
    # Train and predict masks.
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.KEYPOINT_ON = False
    cfg.MODEL.LOAD_PROPOSALS = False
    # Path or URI of the initial weights; "": random initialisation (then BACKBONE.FREEZE_AT must be 0).
    cfg.MODEL.WEIGHTS = ""
    # Per channel in INPUT.FORMAT order, on the 0-255 scale; belongs to the weights.
    cfg.MODEL.PIXEL_MEAN = [103.530, 116.280, 123.675]
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]

    cfg.MODEL.BACKBONE = CN()
    # build_resnet_backbone (C4) or build_resnet_fpn_backbone.
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    # Weights frozen from the input on: 0 nothing, 1 stem, 2 stem and res2, ... GN statistics are never frozen.
    cfg.MODEL.BACKBONE.FREEZE_AT = 2

    cfg.MODEL.FPN = CN()
    cfg.MODEL.FPN.IN_FEATURES = []
    cfg.MODEL.FPN.OUT_CHANNELS = 256
    # Norm of lateral and output convolutions: "", "GN", "LN", "IN", "BN", "SyncBN", "FrozenBN".
    cfg.MODEL.FPN.NORM = ""
    # "sum" or "avg" of top-down and lateral path.
    cfg.MODEL.FPN.FUSE_TYPE = "sum"

    cfg.MODEL.RESNETS = CN()
    # 18, 34, 50, 101 or 152.
    cfg.MODEL.RESNETS.DEPTH = 50
    # ["res4"] for C4, ["res2", "res3", "res4", "res5"] for FPN.
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    # Groups of the 3x3 convolution: 1 ResNet, 32 ResNeXt (not the groups of GN).
    cfg.MODEL.RESNETS.NUM_GROUPS = 1
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64
    # "FrozenBN" is the paper's BN*.
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    # Where a bottleneck strides: True MSRA ResNet, False Torch-style and Detectron's GN and ResNeXt weights.
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    # 1 or 2.
    cfg.MODEL.RESNETS.RES5_DILATION = 1
    # 64 for ResNet-18/34.
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, False]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = False
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = 1


def _add_rpn(cfg: CN) -> None:
    cfg.MODEL.PROPOSAL_GENERATOR = CN()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    # Proposals with a side of at most this many pixels are dropped.
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 0

    cfg.MODEL.ANCHOR_GENERATOR = CN()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
    # Square root of the anchor area in pixels, one list per feature map (or one list for all).
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64, 128, 256, 512]]
    # Height / width.
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [[-90, 0, 90]]
    # Shift of the first anchor centre, in strides: [0, 1).
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0

    cfg.MODEL.RPN = CN()
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.RPN.IN_FEATURES = ["res4"]
    # >= 0: anchors outside the image by more than this are ignored in training.
    cfg.MODEL.RPN.BOUNDARY_THRESH = -1
    # Anchors below the first IoU get the first label, between the second, above the third.
    cfg.MODEL.RPN.IOU_THRESHOLDS = [0.3, 0.7]
    cfg.MODEL.RPN.IOU_LABELS = [0, -1, 1]
    # Anchors sampled per image for the loss and the share of positives aimed at.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256
    cfg.MODEL.RPN.POSITIVE_FRACTION = 0.5
    cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE = "smooth_l1"
    cfg.MODEL.RPN.BBOX_REG_LOSS_WEIGHT = 1.0
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
    # 0: plain L1.
    cfg.MODEL.RPN.SMOOTH_L1_BETA = 0.0
    cfg.MODEL.RPN.LOSS_WEIGHT = 1.0
    # Per feature map, before NMS; per image, after NMS.
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 12000
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 6000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
    cfg.MODEL.RPN.NMS_THRESH = 0.7
    cfg.MODEL.RPN.CONV_DIMS = [-1]


def _add_roi_heads(cfg: CN) -> None:
    cfg.MODEL.ROI_HEADS = CN()
    # StandardROIHeads (FPN) or Res5ROIHeads (C4).
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.5]
    cfg.MODEL.ROI_HEADS.IOU_LABELS = [0, 1]
    # RoIs sampled per image for the losses and the share of foreground aimed at.
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.25
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.5
    # Ground-truth boxes join the proposals in training.
    cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = True

    head = cfg.MODEL.ROI_BOX_HEAD = CN()
    # FastRCNNConvFCHead; the 4conv1fc head is NUM_CONV 4, NUM_FC 1, the 2fc head NUM_CONV 0, NUM_FC 2.
    head.NAME = ""
    head.NUM_CONV = 0
    head.CONV_DIM = 256
    head.NUM_FC = 0
    head.FC_DIM = 1024
    # Norm of the box head's convolutions.
    head.NORM = ""
    head.BBOX_REG_LOSS_TYPE = "smooth_l1"
    head.BBOX_REG_LOSS_WEIGHT = 1.0
    head.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    head.SMOOTH_L1_BETA = 0.0
    head.POOLER_RESOLUTION = 14
    head.POOLER_SAMPLING_RATIO = 0
    head.POOLER_TYPE = "ROIAlignV2"
    head.CLS_AGNOSTIC_BBOX_REG = False
    head.TRAIN_ON_PRED_BOXES = False
    head.USE_FED_LOSS = False
    head.USE_SIGMOID_CE = False
    head.FED_LOSS_FREQ_WEIGHT_POWER = 0.5
    head.FED_LOSS_NUM_CLASSES = 50

    mask = cfg.MODEL.ROI_MASK_HEAD = CN()
    mask.NAME = "MaskRCNNConvUpsampleHead"
    mask.NUM_CONV = 0
    mask.CONV_DIM = 256
    # Norm of the mask head's convolutions and deconvolution's input path.
    mask.NORM = ""
    mask.POOLER_RESOLUTION = 14
    mask.POOLER_SAMPLING_RATIO = 0
    mask.POOLER_TYPE = "ROIAlignV2"
    mask.CLS_AGNOSTIC_MASK = False


def _add_not_implemented(cfg: CN) -> None:
    """Keys of Detectron2's other models: known, so that a config that sets them is refused by name."""
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD = CN()
    cascade.BBOX_REG_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
    cascade.IOUS = (0.5, 0.6, 0.7)

    keypoint = cfg.MODEL.ROI_KEYPOINT_HEAD = CN()
    keypoint.NAME = "KRCNNConvDeconvUpsampleHead"
    keypoint.POOLER_RESOLUTION = 14
    keypoint.POOLER_SAMPLING_RATIO = 0
    keypoint.CONV_DIMS = (512,) * 8
    keypoint.NUM_KEYPOINTS = 17
    keypoint.MIN_KEYPOINTS_PER_IMAGE = 1
    keypoint.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = True
    keypoint.LOSS_WEIGHT = 1.0
    keypoint.POOLER_TYPE = "ROIAlignV2"

    semantic = cfg.MODEL.SEM_SEG_HEAD = CN()
    semantic.NAME = "SemSegFPNHead"
    semantic.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    semantic.IGNORE_VALUE = 255
    semantic.NUM_CLASSES = 54
    semantic.CONVS_DIM = 128
    semantic.COMMON_STRIDE = 4
    semantic.NORM = "GN"
    semantic.LOSS_WEIGHT = 1.0

    panoptic = cfg.MODEL.PANOPTIC_FPN = CN()
    panoptic.INSTANCE_LOSS_WEIGHT = 1.0
    panoptic.COMBINE = CN({"ENABLED": True})
    panoptic.COMBINE.OVERLAP_THRESH = 0.5
    panoptic.COMBINE.STUFF_AREA_LIMIT = 4096
    panoptic.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.5

    retina = cfg.MODEL.RETINANET = CN()
    retina.NUM_CLASSES = 80
    retina.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    retina.NUM_CONVS = 4
    retina.IOU_THRESHOLDS = [0.4, 0.5]
    retina.IOU_LABELS = [0, -1, 1]
    retina.PRIOR_PROB = 0.01
    retina.SCORE_THRESH_TEST = 0.05
    retina.TOPK_CANDIDATES_TEST = 1000
    retina.NMS_THRESH_TEST = 0.5
    retina.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
    retina.FOCAL_LOSS_GAMMA = 2.0
    retina.FOCAL_LOSS_ALPHA = 0.25
    retina.SMOOTH_L1_LOSS_BETA = 0.1
    retina.BBOX_REG_LOSS_TYPE = "smooth_l1"
    retina.NORM = ""


def _add_data(cfg: CN) -> None:
    cfg.INPUT = CN()
    # Length of the shorter side in pixels: one of these (or within [min, max] with sampling "range"); 0 as
    # MIN_SIZE_TEST: no resize.
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    # Upper bound of the longer side.
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    cfg.INPUT.MIN_SIZE_TEST = 800
    cfg.INPUT.MAX_SIZE_TEST = 1333
    # "horizontal", "vertical" or "none".
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.CROP = CN({"ENABLED": False})
    # "relative_range", "relative", "absolute" or "absolute_range", with SIZE as [h, w].
    cfg.INPUT.CROP.TYPE = "relative_range"
    cfg.INPUT.CROP.SIZE = [0.9, 0.9]
    # Channel order of the network input, "BGR" or "RGB", or "L": one gray channel, with one number each in
    # MODEL.PIXEL_MEAN and PIXEL_STD. Belongs to the weights.
    cfg.INPUT.FORMAT = "BGR"
    # "polygon" (RLE masks are kept as bitmaps) or "bitmask" (everything as bitmaps).
    cfg.INPUT.MASK_FORMAT = "polygon"

    cfg.DATASETS = CN()
    # Names (coco_2017_train, shapes_train ...) or "annotations.json@folder/of/images".
    cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ()
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ()
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = 2000
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 1000

    cfg.DATALOADER = CN()
    cfg.DATALOADER.NUM_WORKERS = 4
    # Images of a batch are all wide or all tall: less padding.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    # TrainingSampler or RepeatFactorTrainingSampler (rare categories more often, by REPEAT_THRESHOLD).
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.0
    cfg.DATALOADER.REPEAT_SQRT = True
    # Drop training images without objects.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True


def _add_solver(cfg: CN) -> None:
    solver = cfg.SOLVER = CN()
    # WarmupMultiStepLR, WarmupCosineLR or WarmupStepWithFixedGammaLR.
    solver.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    solver.MAX_ITER = 40000
    solver.BASE_LR = 0.001
    # Final lr of the cosine schedule.
    solver.BASE_LR_END = 0.0
    solver.MOMENTUM = 0.9
    solver.NESTEROV = False
    solver.WEIGHT_DECAY = 0.0001
    # Of gamma and beta; 0 is the paper's fine-tuning recipe.
    solver.WEIGHT_DECAY_NORM = 0.0
    solver.GAMMA = 0.1
    # Iterations at which lr is multiplied by GAMMA.
    solver.STEPS = (30000,)
    # Of WarmupStepWithFixedGammaLR.
    solver.NUM_DECAYS = 3
    # lr starts at WARMUP_FACTOR * BASE_LR and reaches BASE_LR after WARMUP_ITERS.
    solver.WARMUP_FACTOR = 0.001
    solver.WARMUP_ITERS = 1000
    # "linear" or "constant".
    solver.WARMUP_METHOD = "linear"
    # Rescale the warm-up's end value so that the curve joins the schedule.
    solver.RESCALE_INTERVAL = False
    solver.CHECKPOINT_PERIOD = 5000
    # Images of one optimizer step over all GPUs.
    solver.IMS_PER_BATCH = 16
    # > 0: the GPUs that the schedule was written for; another number scales batch, lr and iterations.
    solver.REFERENCE_WORLD_SIZE = 0
    # lr of biases relative to BASE_LR, and their decay (None: WEIGHT_DECAY).
    solver.BIAS_LR_FACTOR = 1.0
    solver.WEIGHT_DECAY_BIAS = None
    solver.CLIP_GRADIENTS = CN({"ENABLED": False})
    # "value", "norm" (per parameter) or "full_model" (one norm over all).
    solver.CLIP_GRADIENTS.CLIP_TYPE = "value"
    solver.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    solver.CLIP_GRADIENTS.NORM_TYPE = 2.0
    # Automatic mixed precision.
    solver.AMP = CN({"ENABLED": False})


def _add_test(cfg: CN) -> None:
    cfg.TEST = CN()
    # [["bbox", "AP", 38.5, 0.2], ...]: results are compared after the final evaluation; a miss fails the run.
    cfg.TEST.EXPECTED_RESULTS = []
    # Evaluate every so many iterations; 0: only at the end.
    cfg.TEST.EVAL_PERIOD = 0
    cfg.TEST.KEYPOINT_OKS_SIGMAS = []
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
    cfg.TEST.AUG = CN({"ENABLED": False})
    cfg.TEST.AUG.MIN_SIZES = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    cfg.TEST.AUG.MAX_SIZE = 4000
    cfg.TEST.AUG.FLIP = True
    cfg.TEST.PRECISE_BN = CN({"ENABLED": False})
    cfg.TEST.PRECISE_BN.NUM_ITER = 200
