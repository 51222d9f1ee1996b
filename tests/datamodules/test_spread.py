from __future__ import annotations

import pytest

from datamodules.spread import spread


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1617, 5000])
def test_the_first_samples_take_every_record_once(total: int) -> None:
    assert sorted(spread(range(total), total)) == list(range(total))
    assert spread(range(total, 2 * total), total) == spread(range(total), total)


@pytest.mark.parametrize("count", [100, 1000, 2048, 30_000])
def test_any_first_so_many_samples_see_classes_alike_in_data_sorted_by_class(count: int) -> None:
    classes, records = 10, 1000
    labels = [place // records for place in spread(range(count), classes * records)]
    share = count / classes
    assert all(abs(labels.count(label) - share) <= 3 for label in range(classes))


def test_a_samples_record_does_not_depend_on_who_asks() -> None:
    assert spread([70, 3], 100) == [spread(range(100), 100)[70], spread(range(100), 100)[3]]
