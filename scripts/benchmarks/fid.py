"""What ``scripts.benchmark_metrics`` compares: FID of images, and of features that are given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scripts.benchmarks.memory import PeakMemory

REFERENCE = 1_000_000_000  # the number of the reference set's first image
DIM = 2048  # features of Inception


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        of: ``images``, which Inception sees, or ``features``, as if it had seen them.
        count: of both sets together, half generated and half reference.
        size: height and width of an image.
        batch: images at once.
        device: ``cpu`` or ``cuda``.
        weights: Inception's weights.
        threads: of PyTorch; 0 leaves its default.
        clock: ``wall``, or ``cpu`` for the process's own time, where others keep the CPU busy.
    """

    of: str
    count: int
    size: int
    batch: int
    device: str
    weights: str
    threads: int = 0
    clock: str = "wall"


@dataclass(frozen=True)
class Found:
    """What one process measured.

    Attributes:
        rate: images or features a second, up to what the distance is computed of.
        distance: seconds for the distance.
        memory: bytes at most, above those before the network was built.
        value: the FID.
    """

    rate: float
    distance: float
    memory: float
    value: float


class Pictures(Dataset[Tensor]):
    """8-bit images ``(3, S, S)``, each a function of its number, so that none need be kept.

    Args:
        settings: how many and how large.
        first: the first one's number; the reference set's images have less contrast.
    """

    def __init__(self, settings: Settings, first: int) -> None:
        self.count, self.size, self.first = settings.count // 2, settings.size, first
        self.least, self.most = (40, 200) if first >= REFERENCE else (0, 256)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.first + index)
        shape = (3, self.size, self.size)
        return torch.randint(self.least, self.most, shape, dtype=torch.uint8, generator=generator)


def random_weights(path: Path, seed: int = 0) -> None:
    """Writes weights of Inception that keep activations of order one, but know nothing."""
    from fewstep.metrics.inception_network import InceptionNetwork

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = InceptionNetwork()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
    torch.save(network.state_dict(), path)


def measured(
    settings: Settings,
    memory: PeakMemory,
    look: Callable[[], object],
    distance: Callable[[], float],
) -> Found:
    """Times looking at all images and then taking the distance."""

    def now() -> float:
        if settings.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if settings.clock == "cpu" else time.perf_counter()

    start = now()
    look()
    seen = now()
    value = distance()
    end = now()
    return Found(settings.count / (seen - start), end - seen, memory.read(), value)


def ours(settings: Settings) -> Found:
    """FID as fewstep takes it."""
    from fewstep.metrics import FID, InceptionFeatures, Samples, Statistics, collect

    memory = PeakMemory(settings.device)
    device = torch.device(settings.device)
    metric = FID(InceptionFeatures(settings.weights, batch_size=settings.batch))
    metric.features.load(device)

    def batches(first: int) -> Iterator[Samples]:
        for pixels in DataLoader(Pictures(settings, first), settings.batch):
            yield Samples(pixels.to(device).float() / 127.5 - 1, torch.arange(len(pixels)))

    sides: list[Statistics] = []

    def look() -> None:
        sides.extend(collect([metric], batches(first))[0] for first in (0, REFERENCE))

    return measured(settings, memory, look, lambda: metric.compute(*sides)["fid"])


def torch_fidelity(settings: Settings) -> Found:
    """torch-fidelity's, which keeps the features of all images."""
    from torch_fidelity import metric_fid, utils

    memory = PeakMemory(settings.device)
    cuda = settings.device == "cuda"
    network = utils.create_feature_extractor(
        "inception-v3-compat",
        ["2048"],
        cuda=cuda,
        verbose=False,
        feature_extractor_weights_path=settings.weights,
    )
    sides = []

    def look() -> None:
        for first in (0, REFERENCE):
            images = Pictures(settings, first)
            found = utils.get_featuresdict_from_dataset(
                images, network, settings.batch, cuda, save_cpu_ram=True, verbose=False
            )
            sides.append(metric_fid.fid_features_to_statistics(found["2048"]))

    def distance() -> float:
        (value,) = metric_fid.fid_statistics_to_metric(*sides, verbose=False).values()
        return value

    return measured(settings, memory, look, distance)


def torchmetrics(settings: Settings) -> Found:
    """torchmetrics', with the resize that published values mean."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    memory = PeakMemory(settings.device)
    metric = FrechetInceptionDistance(
        feature_extractor_weights_path=settings.weights, antialias=False
    ).to(settings.device)

    def look() -> None:
        with torch.no_grad():
            for first in (0, REFERENCE):
                for images in DataLoader(Pictures(settings, first), settings.batch):
                    metric.update(images.to(settings.device), real=first == REFERENCE)

    return measured(settings, memory, look, lambda: float(metric.compute()))


def rows(settings: Settings, first: int) -> Iterator[Tensor]:
    """Features ``(B, 2048)`` of one set, made up as they are asked for."""
    generator = torch.Generator(settings.device).manual_seed(first)
    for start in range(0, settings.count // 2, settings.batch):
        size = min(settings.batch, settings.count // 2 - start)
        made = torch.rand(size, DIM, generator=generator, device=settings.device)
        yield made.square() if first >= REFERENCE else made


def our_features(settings: Settings) -> Found:
    """The statistics and the distance of fewstep's FID."""
    from fewstep.metrics import GaussianStatistics, frechet_distance

    memory = PeakMemory(settings.device)
    sides = [GaussianStatistics(), GaussianStatistics()]

    def look() -> None:
        for side, first in zip(sides, (0, REFERENCE), strict=True):
            for made in rows(settings, first):
                side.add(made)

    def distance() -> float:
        return float(frechet_distance(*sides[0].moments(), *sides[1].moments()))

    return measured(settings, memory, look, distance)


def torch_fidelity_features(settings: Settings) -> Found:
    """torch-fidelity's, from the table of all features that it keeps."""
    from torch_fidelity import metric_fid

    memory = PeakMemory(settings.device)
    sides = []

    def look() -> None:
        for first in (0, REFERENCE):
            found = torch.cat([made.cpu() for made in rows(settings, first)])
            sides.append(metric_fid.fid_features_to_statistics(found))

    def distance() -> float:
        (value,) = metric_fid.fid_statistics_to_metric(*sides, verbose=False).values()
        return value

    return measured(settings, memory, look, distance)


class Given(nn.Module):
    """A network for torchmetrics whose features are its input."""

    num_features = DIM

    def forward(self, rows: Tensor) -> Tensor:
        """The same."""
        return rows


def torchmetrics_features(settings: Settings) -> Found:
    """Torchmetrics' sums and distance."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    memory = PeakMemory(settings.device)
    metric = FrechetInceptionDistance(feature=Given()).to(settings.device)

    def look() -> None:
        for first in (0, REFERENCE):
            for made in rows(settings, first):
                metric.update(made, real=first == REFERENCE)

    return measured(settings, memory, look, lambda: float(metric.compute()))


Contestant = Callable[[Settings], Found]
CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "images": {"ours": ours, "torch-fidelity": torch_fidelity, "torchmetrics": torchmetrics},
    "features": {
        "ours": our_features,
        "torch-fidelity": torch_fidelity_features,
        "torchmetrics": torchmetrics_features,
    },
}
NAMES = list(CONTESTANTS["images"])
