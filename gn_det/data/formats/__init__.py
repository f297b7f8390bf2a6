"""Annotation formats of other tools, to and from COCO json; :mod:`gn_det.data.formats.exchange` is the entry."""
