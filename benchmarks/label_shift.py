"""Latent label shift beside what knows less: ``python -m benchmarks.label_shift RUN/checkpoints/best.ckpt ...``.

For each run of LatentLabelShift, accuracies on its test set after the best matching of found to true classes: of the
method, of k-means on the pixels, on the discriminator's features and on its domain probabilities, and of the most
frequent class of every domain, which only who knows p(y|d) could name. As many clusters as classes, twenty starts.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def data_of(checkpoint: Path) -> Any:
    """The data of the run that wrote it."""
    from zoo.cli import ZooCLI, complete

    class Assembled(ZooCLI):
        """Everything that ``zoo test`` builds, without running it."""

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    arguments = complete(["test", "--ckpt_path", str(checkpoint), "--trainer.accelerator=cpu"])
    return Assembled(arguments).datamodule


@torch.no_grad()
def accuracies(checkpoint: Path) -> dict[str, float]:
    """Name to matched accuracy on the run's test set."""
    from zoo import Method
    from zoo.core.label_shift import MatchedAccuracy, discretize

    data = data_of(checkpoint)
    method: Any = Method.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    data.prepare_data()
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()["test"]]
    x, y, d = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "domain"))
    parts = [method.network.features(part).double() for part in x.split(512)]
    features = torch.cat(parts)
    q = torch.cat([method.network.logits(part.float()).double().softmax(dim=1) for part in parts])
    count = method.num_classes

    def clustered(points: Tensor) -> Tensor:
        return F.one_hot(discretize(points, count, restarts=20), count)

    found = {
        "method": torch.cat([method.posterior(a, b) for a, b in zip(x.split(512), d.split(512), strict=True)]),
        "k-means on pixels": clustered(x.flatten(1)),
        "k-means on features": clustered(features),
        "k-means on q(d|x)": clustered(q),
        "frequent class of the domain": data.class_given_domain.mT[d],
    }
    measured = {}
    for name, scores in found.items():
        metric = MatchedAccuracy(count)
        metric.update(scores, y)
        measured[name] = float(metric.compute())
    return measured


def main() -> int:
    """Print a table, a row for each checkpoint."""
    for number, argument in enumerate(sys.argv[1:]):
        measured = accuracies(Path(argument))
        if number == 0:
            print("| checkpoint | " + " | ".join(measured) + " |\n|" + "---|" * (len(measured) + 1))
        print(f"| {argument} | " + " | ".join(f"{value:.3f}" for value in measured.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
