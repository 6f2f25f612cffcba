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
        """
        found = {}
        x = self.get_submodule("stem")(x)
        for name in self.feature_channels:
            x = found[name] = self.get_submodule(name)(x)
        return found

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that the official recipe does not decay: every `srelu_bias`.

        timm's optimizer factory and others that follow its convention ask for it (`isonet_fast.param_groups` knows it).
        """
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] == "srelu_bias"}
