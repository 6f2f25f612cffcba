"""Each line that ends in `# wrong` is an error for a type checker, and no other line."""

import torch
from torch import Tensor, nn

from isonet_fast import OrthoConv2d, OrthoLinear, OrthoRegularizer, SReLU, functional, init, models, reference

weight = torch.zeros(4, 4, 3, 3)
OrthoConv2d("a", 4, 3)  # wrong
OrthoConv2d(4, 4, 3, nonsense=3)  # wrong
OrthoConv2d(4, 4, 3, penalty="wrong")  # wrong
OrthoConv2d(4, 4, (3, 3, 3))  # wrong
OrthoConv2d(4, 4, 3, padding_mode="mirror")  # wrong
OrthoLinear(4, 4, penalty="orthogonal")  # wrong
SReLU(4, spatial_dims="inferred")  # wrong
functional.orthogonality_loss(weight, penalty="wrong")  # wrong
functional.orthogonality_loss(weight, penalty=None)  # wrong
functional.orthogonality_loss(weight, precision="float32")  # wrong
functional.orthogonality_loss(weight, 2)  # wrong
functional.orthogonality_loss(weight, stride="same")  # wrong
reference.orthogonality_loss(weight, penalty="wrong")  # wrong
OrthoRegularizer(nn.Identity(), penalty="wrong")  # wrong
OrthoRegularizer(nn.Identity(), precision="medium")  # wrong
OrthoRegularizer(nn.Identity(), filter=lambda name: True)  # wrong
OrthoRegularizer(nn.Identity(), include="Linear")  # wrong
OrthoRegularizer(nn.Identity()).accumulate_grad_(scale=2.0)  # wrong
init.delta_(weight, strides=2)  # wrong
models.isonet50(10)  # wrong
models.isonet50(classes=10)  # wrong
models.isonet50(activation="gelu")  # wrong
text: str = functional.srelu(weight, weight)  # wrong
right: Tensor = functional.srelu(weight, weight)
