"""How images are normalised before a network sees them: mean and deviation of each channel, for values in 0..1."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
