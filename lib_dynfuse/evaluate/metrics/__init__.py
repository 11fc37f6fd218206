"""What is measured of a picture. A metric is one class: see metric.py; those that there are stand in similarities.py."""

from .encoders import EncoderNames, Shelf
from .metric import Metric
from .registry import known_metrics, metric_class

__all__ = ["EncoderNames", "Metric", "Shelf", "known_metrics", "metric_class"]
