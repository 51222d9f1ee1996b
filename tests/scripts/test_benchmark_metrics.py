from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
import torch

from scripts import benchmark_metrics
from scripts.benchmark_metrics import compare, main, report_one
from scripts.benchmarks import fid
from scripts.benchmarks.fid import CONTESTANTS, NAMES, REFERENCE, Found, Pictures, Settings

FEATURES = Settings("features", count=80, size=8, batch=7, device="cpu", weights="")


@pytest.fixture(autouse=True)
def _few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "DIM", 8)
    monkeypatch.setattr(fid.Given, "num_features", 8)


def test_images_are_a_function_of_their_number_and_set() -> None:
    settings = replace(FEATURES, of="images", count=12)
    generated, real = Pictures(settings, 0), Pictures(settings, REFERENCE)
    assert len(generated) == 6
    assert generated[5].shape == (3, 8, 8)
    assert torch.equal(generated[5], Pictures(settings, 2)[3])
    assert not torch.equal(generated[5], generated[4])
    assert int(real[0].min()) >= 40 > int(generated[0].min())


def test_all_take_the_same_distance_of_the_same_features() -> None:
    found = {name: CONTESTANTS["features"][name](FEATURES) for name in NAMES}
    assert found["ours"].value > 0.1
    for measured in found.values():
        assert measured.value == pytest.approx(found["ours"].value, rel=1e-3)
        assert measured.rate > 0


def test_one_process_takes_settings_and_prints_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(FEATURES))))
    report_one("ours")
    found = Found(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found.value == pytest.approx(CONTESTANTS["features"]["ours"](FEATURES).value)


def test_the_table_compares_medians_and_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def pretend(name: str, settings: Settings) -> Found:
        calls.append((name, settings.count))
        rate = {"ours": 8.0, "torch-fidelity": 4.0, "torchmetrics": 2.0}[name]
        slow = 100 if len(calls) == 1 else 1  # one round was disturbed
        grows = 1 if name == "torch-fidelity" else 0
        memory = 2.0**20 * (50 + grows * settings.count)
        return Found(rate / slow, 3.0 / rate, memory, 1.25)

    monkeypatch.setattr(benchmark_metrics, "in_own_process", pretend)
    text = compare(FEATURES, rounds=3)
    assert calls == [(name, 80) for name in NAMES] * 3 + [(name, 20) for name in NAMES]
    title, _, *rows, last = text.splitlines()
    assert title.startswith("FID of 40 against 40 features, batches of 7, cpu")
    cells = [row.split() for row in rows]
    assert [row[:3] for row in cells] == [
        ["ours", "8.00", "1.00x"],
        ["torch-fidelity", "4.00", "2.00x"],
        ["torchmetrics", "2.00", "4.00x"],
    ]
    assert cells[1][-5:] == ["130", "MiB", "70", "MiB", "1.250000"]
    assert last.endswith("ours +0 MiB, torch-fidelity +60 MiB, torchmetrics +0 MiB")


@pytest.mark.slow
def test_the_command_compares_a_few_images(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "--images",
            "16",
            "--features",
            "0",
            "--size",
            "16",
            "--batch",
            "4",
            "--rounds",
            "1",
            "--threads",
            "1",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split()[-1]) for line in lines[2:5]]
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)
    assert values[0] > 0
