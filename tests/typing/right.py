"""The public names with arguments of every kind. No type checker finds a fault here, or in the docstrings' examples."""

import torch
from torch import Tensor, nn

import isonet_fast
from isonet_fast import (
    OrthoConv1d,
    OrthoConv2d,
    OrthoConv3d,
    OrthoLinear,
    OrthoRegularizer,
    ResidualSReLU,
    SharedScale,
    SReLU,
    convert,
    deconvert,
    diagnostics,
    functional,
    info,
    init,
    models,
    param_groups,
    reference,
)
from isonet_fast.geometry import Penalty


class Net(nn.Module):
    """A residual block of one's own."""

    def __init__(self, penalty: Penalty | None = None) -> None:
        super().__init__()
        self.conv = OrthoConv2d(3, 8, 3, padding="same", bias=False, penalty=penalty, dtype=torch.float32)
        self.act = SReLU(8, init=-1.0, inplace=True, spatial_dims=2)
        self.scale = SharedScale(0.5)
        self.join = ResidualSReLU(8)
        self.head = OrthoLinear(8, 10, device="cpu", penalty="lorth")

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = self.join(x, self.scale.fold(self.conv, x), self.scale.scale)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


conv1d = OrthoConv1d(4, 4, (3,), stride=2, padding_mode="circular")
conv3d = OrthoConv3d(4, 4, (3, 3, 3), dilation=(1, 2, 1), groups=2, penalty="matrix")
own: Penalty | None = conv3d.penalty
loss: Tensor = conv1d.orthogonality_loss() + conv3d.orthogonality_loss()
conv1d.reset_parameters()
weight: Tensor = conv3d.weight
bias: nn.Parameter = Net().act.srelu_bias

x, b = torch.zeros(2, 8, 4, 4), torch.zeros(8)
y: Tensor = functional.srelu(x, b, inplace=True, spatial_dims=2) + reference.srelu(x, b)
y = functional.residual_srelu(x, x, b, scale=torch.ones(1)) + reference.residual_srelu(x, x, b)
loss = functional.orthogonality_loss(weight, stride=2, dilation=(1, 2, 1), penalty="lorth", precision="highest")
loss += functional.orthogonality_loss([weight, weight], stride=[1, (2, 2, 2)], groups=[1, 2], precision=None)
loss += reference.orthogonality_loss([weight, weight], stride=[1, (2, 2, 2)], groups=[1, 2], penalty="matrix")
weight = init.delta_(weight, groups=2, stride=(2, 2, 1))

net = Net("isonet")
reg = OrthoRegularizer(net, 1e-4, "lorth", lambda name, module: name != "conv", interval=2, precision="highest")
reg = OrthoRegularizer(net, coeff=lambda name, module: 1e-4, include=(nn.Linear, nn.ConvTranspose2d), work_group=None)
loss = nn.functional.cross_entropy(net(x), torch.zeros(2, dtype=torch.long)) + reg()
loss = reg.accumulate_grad_(grad_scale=2.0) + reg.last + reg.last_total()
reg.load_state_dict(reg.state_dict())
computed: bool = reg.computed
chosen: tuple[Penalty | None, int] = reg.penalty, reg.interval
row = reg.summary()[0]
cost: float = row.gflop + row.value + row.coeff
excluded: str = row.excluded

values: Tensor = diagnostics.singular_values(conv1d, (8,))
report = diagnostics.isometry_report(net, (3, 8, 8), include=nn.Linear)
largest: float = report[0].largest

optimizer = torch.optim.SGD(param_groups(net, lr=0.1, weight_decay=1e-4), momentum=0.9)
plain: nn.Module = deconvert(convert(net))

networks = [
    models.isonet18(num_classes=10, in_channels=1, dropout=None),
    models.isonet34(),
    models.isonet50(),
    models.isonet101(),
    models.risonet18(dropout=0.4, activation="relu", normalisation="batch", branch_scale=None),
    models.risonet34(),
    models.risonet50(),
    models.risonet101(),
]
features: dict[str, Tensor] = networks[0].features(x)
channels: dict[str, int] = networks[0].feature_channels
small = models.isonet_cifar(20, residual=True, width=32, num_classes=100, in_channels=3, dropout=0.1)
undecayed: set[str] = small.no_weight_decay()
loaded: nn.Module = models.load_official(small, "checkpoint.pt")

info()
version: str = isonet_fast.__version__
