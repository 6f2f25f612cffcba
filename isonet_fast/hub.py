"""The networks with Hugging Face's `save_pretrained`, `from_pretrained` and `push_to_hub`.

    net = isonet_fast.hub.ISONet(50, residual=True, num_classes=10)
    net.save_pretrained("folder")                       # config.json, model.safetensors
    net = isonet_fast.hub.ISONet.from_pretrained("folder")

`import isonet_fast.hub` needs huggingface_hub and safetensors. The state_dict is that of `isonet_fast.models`.
"""

from __future__ import annotations

from typing import Any

try:
    import safetensors.torch  # noqa: F401
    from huggingface_hub import PyTorchModelHubMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"isonet_fast.hub needs huggingface_hub and safetensors: pip install huggingface_hub safetensors ({error})"
    ) from error

from .models.isonet import ISONet as _ISONet
from .models.isonet_cifar import ISONetCifar as _ISONetCifar

__all__ = ["ISONet", "ISONetCifar"]
_CARD: dict[str, Any] = dict(
    library_name="isonet_fast",
    pipeline_tag="image-classification",
    license="mit",
    paper_url="https://arxiv.org/abs/2006.16992",
)


class ISONet(_ISONet, PyTorchModelHubMixin, **_CARD):
    """ISONet(depth, residual=False, num_classes=1000, in_channels=3, dropout=None), depth 18, 34, 50 or 101.

    Examples:
        >>> import isonet_fast.hub
        >>> isonet_fast.hub.ISONet(18, num_classes=10).save_pretrained("folder")
        >>> isonet_fast.hub.ISONet.from_pretrained("folder").head.fc
        Loading weights from local directory
        Linear(in_features=512, out_features=10, bias=True)
    """


class ISONetCifar(_ISONetCifar, PyTorchModelHubMixin, **_CARD):
    """ISONetCifar(depth, residual=False, width=16, num_classes=10, in_channels=3, dropout=None), depth 6 n + 2.

    Examples:
        >>> import isonet_fast.hub
        >>> isonet_fast.hub.ISONetCifar(8, width=4).save_pretrained("folder")
        >>> isonet_fast.hub.ISONetCifar.from_pretrained("folder")(torch.zeros(1, 3, 32, 32)).shape
        Loading weights from local directory
        torch.Size([1, 10])
    """
