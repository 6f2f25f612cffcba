"""torchvision's nms and roi_align in plain PyTorch, for where its compiled operators do not load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no kept box of a higher score overlaps by more than the threshold, best first.

    boxes: (N, 4) as x1, y1, x2, y2; scores: (N,). Of equal scores the first comes first. A box is kept if no kept box
    with a better score overlaps it. This rule has one solution, and repeating it from any start leads there. After k
    rounds the k best boxes are decided. In practice a few rounds usually decide all boxes.
    """
    order = scores.argsort(descending=True, stable=True)
    # overlaps[i, j]: the better box i would suppress box j
    overlaps = (_iou(boxes[order]) > iou_threshold).triu(1)
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        now = ~overlaps[kept].any(0)
        if torch.equal(now, kept):
            return order[kept]
        kept = now


def _iou(boxes: Tensor) -> Tensor:
    boxes = boxes.double() if boxes.dtype == torch.float64 else boxes.float()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inner = torch.min(boxes[:, None, 2:], boxes[:, 2:]) - torch.max(boxes[:, None, :2], boxes[:, :2])
    shared = inner.clamp(min=0).prod(2)
    return shared / (area[:, None] + area - shared)


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Mean of bilinear samples in each cell of a grid over each box (He et al., "Mask R-CNN", ICCV 2017).

    input: (N, C, H, W). boxes: (K, 5) as index of the image, x1, y1, x2, y2, or for each image one of (L, 4); in pixels
    of the image, `spatial_scale` of which is one of the input. Returns (K, C, *output_size), differentiable in `input`.
    sampling_ratio: samples per cell and axis; not positive: the cell's size in pixels of the input, rounded up.
    aligned: pixel centres are at halves. A sample up to one pixel outside has the value at the edge, further away 0.
    """
    if not isinstance(boxes, Tensor):
        boxes = torch.cat([F.pad(part, (1, 0), value=n) for n, part in enumerate(boxes)])
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    shift = 0.5 if aligned else 0.0
    start, end = (boxes[:, at : at + 2].detach() * spatial_scale - shift for at in (1, 3))  # x, y
    size = end - start if aligned else (end - start).clamp(min=1)
    cell = size / torch.tensor([width, height], dtype=size.dtype, device=size.device)
    samples = cell.ceil().clamp(min=1) if sampling_ratio <= 0 else torch.full_like(cell, sampling_ratio)
    if not len(boxes):
        return input.flatten()[:0].reshape(0, input.shape[1], height, width)
    output = input.new_zeros(len(boxes), input.shape[1], height, width)
    alike = torch.cat(
        [boxes[:, :1].detach(), samples], 1
    ).long()  # boxes of one image and number of samples go together
    for image, nx, ny in alike.unique(dim=0).tolist():
        rows = (alike == torch.tensor([image, nx, ny], device=alike.device)).all(1).nonzero()[:, 0]
        x = _positions(start[rows, 0], size[rows, 0], width * nx)
        y = _positions(start[rows, 1], size[rows, 1], height * ny)
        values = _sample(input[image], x, y).unflatten(2, (height, ny)).unflatten(4, (width, nx))
        output = output.index_copy(0, rows, values.mean((3, 5)).to(output.dtype))
    return output


def _positions(start: Tensor, size: Tensor, count: int) -> Tensor:
    """(K, count): the middles of `count` equal parts from `start` on."""
    middles = torch.arange(count, dtype=start.dtype, device=start.device) + 0.5
    return start[:, None] + size[:, None] * middles / count


def _sample(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(K, C, Y, X) out of (C, H, W) at the rows y (K, Y) and the columns x (K, X) of each box."""
    height, width = image.shape[1:]
    image = image if image.dtype == torch.float64 else image.float()
    x, y = x.to(image.dtype), y.to(image.dtype)
    inside = ((y >= -1) & (y <= height))[:, :, None] & ((x >= -1) & (x <= width))[:, None]
    across, down = (x * 2 + 1) / width - 1, (y * 2 + 1) / height - 1  # in the units of grid_sample
    grid = torch.stack([across[:, None].expand_as(inside), down[:, :, None].expand_as(inside)], -1)
    found = F.grid_sample(image[None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=False)
    return (found[0].unflatten(1, inside.shape[:2]) * inside).transpose(0, 1)
