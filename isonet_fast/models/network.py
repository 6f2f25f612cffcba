"""What every network shares: a stem, stages s1, s2, ... and a head in a row, their features, and what never decays."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """stem, then the stages of `feature_channels`, then head."""

    feature_channels: dict[str, int]  # the channels that each stage returns, by its name, in order

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, num_classes)
        for part in self.children():
            x = part(x)
        return x

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """What each stage returns, by its name: {"s1": (N, C1, H1, W1), ...}, with the channels of `feature_channels`.

        The head is not computed. x: (N, in_channels, H, W).

        Examples:
            >>> net = isonet_fast.models.isonet_cifar(8, width=4)
            >>> {name: tuple(x.shape) for name, x in net.features(torch.zeros(1, 3, 32, 32)).items()}
            {'s1': (1, 4, 32, 32), 's2': (1, 8, 16, 16), 's3': (1, 16, 8, 8)}
        """
        found = {}
        x = self.get_submodule("stem")(x)
        for name in self.feature_channels:
            x = found[name] = self.get_submodule(name)(x)
        return found

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that the official recipe does not decay: every `srelu_bias`.

        timm's optimizer factory and others that follow its convention ask for it (`isonet_fast.param_groups` knows it).

        Examples:
            >>> sorted(isonet_fast.models.isonet_cifar(8, width=4).no_weight_decay())[0]
            's1.b1.f.a_relu.srelu_bias'
        """
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] == "srelu_bias"}
