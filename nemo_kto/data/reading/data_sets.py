"""Data sets of the library `datasets` -> rows; it is imported where there is one."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_kto.data.reading.containers import Row, Rows, rows_at_once, without_nulls


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved this folder (`save_to_disk`)."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def dataset_rows(dataset: Any, source: str) -> Rows:
    """Yields the rows of a `datasets.Dataset`, numbered from 1."""
    number = 0
    for batch in _batches(dataset):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Row(source, number, without_nulls(dict(zip(names, values, strict=True))))


def _batches(dataset: Any) -> Iterator[dict[str, list[Any]]]:
    """Some rows at a time of a data set, column by column; images as they are stored, in `{"bytes", "path"}`."""
    size = rows_at_once(dataset.data.nbytes, dataset.data.num_rows)
    features = _undecoded(dataset.features)
    if features is None:
        yield from dataset.with_format(None).iter(size)
        return
    for table in dataset.with_format("arrow").iter(size):
        yield features.decode_batch(table.to_pydict())


def _undecoded(features: Any) -> Any:
    """The features of a data set with none that makes an image, a sound or a video of bytes; None if all are so."""
    import datasets

    kinds = tuple(getattr(datasets, name) for name in ("Image", "Audio", "Video") if hasattr(datasets, name))
    features, found = copy.deepcopy(features), False
    pending = list(features.values())
    while pending:
        feature = pending.pop()
        if isinstance(feature, kinds):
            feature.decode, found = False, True
        elif isinstance(feature, Mapping):
            pending += feature.values()
        elif isinstance(feature, list):
            pending += feature
        else:
            pending += [feature.feature] if hasattr(feature, "feature") else []
    return datasets.Features(features) if found else None
