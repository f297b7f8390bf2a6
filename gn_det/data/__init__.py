"""COCO-format data to samples. Import the modules directly; this package imports nothing by itself."""
