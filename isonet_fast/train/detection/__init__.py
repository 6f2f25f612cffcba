"""Object detection on COCO: data, training, evaluation."""
