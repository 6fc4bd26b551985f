"""What DCP's save returns must describe the files, in every supported torch."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from accel_moe.checkpoint.dcp_write import ChecksumWriter


def test_the_metadata_that_save_returns_is_filled_in_where_torch_fills_in_a_copy(tmp_path, monkeypatch):
    """torch 2.11's finish() works on a copy; found by the first save on a machine with that version."""
    monkeypatch.setattr(FileSystemWriter, "finish", lambda self, metadata, results: None)
    metadata = Metadata(state_dict_metadata={})
    with ThreadPoolExecutor(1) as pool:
        writer = ChecksumWriter(tmp_path, pool)
        writer.finish(metadata, [[SimpleNamespace(index="a", storage_data="file of a")]])
    assert metadata.storage_data == {"a": "file of a"}
    assert metadata.storage_meta is not None
