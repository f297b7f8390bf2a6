"""``python -m gn_det.detectron2 TOOL [ARGUMENTS]``; see :mod:`gn_det.detectron2.tools`."""

import runpy

# In a separate module, because processes started by a tool import the main module, but never a __main__.py.
runpy.run_module("gn_det.detectron2.tools", run_name="__main__", alter_sys=True)
