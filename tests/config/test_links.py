"""Links that lead out of a folder somebody else may have made are not followed; those of the hub's cache are."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kto.config.folders import check_links, link_out_of
from nemo_kto.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model" / "below").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "../missing", "below/../../secret"])
def test_a_link_out_of_a_folder(folder: Path, target: str) -> None:
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to .*, out of its folder"):
        check_links(folder)


def test_links_within_a_folder_and_to_one(folder: Path, tmp_path: Path) -> None:
    (folder / "other.json").symlink_to("config.json")
    (tmp_path / "latest").symlink_to(folder)
    check_links(folder)
    check_links(tmp_path / "latest")


def test_folders_in_a_checkpoint_are_looked_through(folder: Path) -> None:
    (folder / "below" / "config.json").symlink_to("../../secret")
    assert link_out_of(folder) is None and link_out_of(folder, below=True) == folder / "below" / "config.json"


def test_the_hubs_cache(tmp_path: Path) -> None:
    """As huggingface_hub lays it out: a snapshot's files are links to blobs named by their content."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    check_links(snapshot)
    (snapshot / "other").symlink_to("../../../elsewhere")
    with pytest.raises(CheckpointError, match="other is a link"):
        check_links(snapshot)
