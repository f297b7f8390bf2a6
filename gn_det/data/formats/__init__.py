"""Annotation formats of other tools, to and from COCO json; start at :mod:`gn_det.data.formats.exchange`."""

#: Module of each format except COCO json.
MODULES = {"yolo": "yolo", "voc": "voc", "labelme": "labelme", "cvat": "cvat", "masks": "png_masks"}
FORMATS = ("coco", *MODULES)
