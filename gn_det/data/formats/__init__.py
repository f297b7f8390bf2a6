"""Annotation formats of other tools, to and from COCO json; start at :mod:`gn_det.data.formats.exchange`."""
