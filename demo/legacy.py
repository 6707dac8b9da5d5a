"""A script that has never heard of ckptd: it trains and calls torch.save, no more.

It writes straight under the final names, as many do, so that a reader may well see half a file.
"""

import argparse
import time
from pathlib import Path

import torch


def main() -> None:
    """Fit a line through noise and save every few seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--saves", type=int, required=True)
    parser.add_argument("--every-s", type=float, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(1, options.saves + 1):
        inputs = torch.randn(64, 256)
        loss = torch.nn.functional.mse_loss(model(inputs), inputs.roll(1, dims=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path = options.dir / f"checkpoint_epoch_{epoch}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, path)
        print(path.name, flush=True)
        time.sleep(options.every_s)


if __name__ == "__main__":
    main()
