"""The bare loop that the engine is held against: one process, plain PyTorch, FedAvg by hand, the same gradient steps.

python benchmarks/bare.py SITES_FOLDER ROUNDS STEPS WIDTH
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a site, (n, 1, size, size) float32 in [0, 1], and their classes."""
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = np.stack([np.asarray(Image.open(folder / row["path"]), np.float32) / 255 for row in rows])
    return torch.from_numpy(images)[:, None], torch.tensor([int(row["label"] == "right") for row in rows])


def network(width: int) -> nn.Module:
    """The product's cnn, written out."""
    layers: list[nn.Module] = []
    channels = 1
    for stage, out in enumerate((width, 2 * width, 4 * width)):
        for inner in (channels, out):
            layers += [nn.Conv2d(inner, out, 3, padding=1, bias=False), nn.GroupNorm(np.gcd(8, out), out), nn.ReLU()]
        if stage < 2:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        channels = out

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Sequential(*layers), nn.Linear(2 * channels, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.features(x)
            return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))  # type: ignore[no-any-return]

    return Network()


def main(root: Path, rounds: int, steps: int, width: int, batch: int = 32) -> None:
    """Train and print the last training loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sites = [load(folder) for folder in sorted(root.iterdir())]
    model = network(width).to(memory_format=torch.channels_last)
    weights = [value.clone() for value in model.state_dict().values()]
    moments: list[dict[str, object] | None] = [None] * len(sites)
    loss = torch.zeros(())
    for number in range(rounds):
        total = [torch.zeros_like(value) for value in weights]
        for place, (images, classes) in enumerate(sites):
            torch._foreach_copy_(list(model.state_dict().values()), weights)
            optimizer = torch.optim.AdamW(model.parameters(), 0.002, weight_decay=0.001)
            if moments[place]:
                optimizer.load_state_dict(moments[place])  # type: ignore[arg-type]
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))
            for start in range(0, steps * batch, batch):
                chosen = order[start % len(order) :][:batch]
                optimizer.zero_grad(set_to_none=True)
                shown = ((images[chosen] - 0.5) / 0.25).to(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(shown), classes[chosen])
                loss.backward()
                optimizer.step()
            moments[place] = optimizer.state_dict()
            torch._foreach_add_(total, list(model.state_dict().values()), alpha=1 / len(sites))
        weights = total
    print(f"loss {loss.item():.6f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
