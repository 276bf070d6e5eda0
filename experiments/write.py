"""Writes a data set as TFDS ArrayRecord: whole, or not at all.

The files are made in a directory beside the final one, counted, and renamed into place
at the end, so that whatever stops the work - a full disk, a damaged archive, Ctrl-C -
leaves either the old set or none. A kill leaves `.VERSION.partial`, which the next try
empties; one that is being written is locked. TFDS's documented
`folder_dataset.write_metadata` makes the set one of its own:
`tfds.builder_from_directory` reads it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.originals import Examples, Original
from experiments.sources import DataError, Records

SHARD_BYTES = 256 * 2**20
"""A file is closed once it holds this many bytes of records."""


def write_set(
    original: Original,
    data_path: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Path, dict[str, int]]:
    """Writes every split of a data set.

    Args:
      original: The set.
      data_path: Directory of data sets; the set goes to DIR/NAME/VERSION.
      overwrite: Replace a set that is there; it stays until the new one is whole.
      progress: Show a bar per split, with rate and time left, on standard error.

    Returns:
      DIR/NAME/VERSION, and the number of images in every split.

    Raises:
      DataError: The place is below a regular file, taken, not writable or too small,
        or another process writes the set (before any work); or the disk fills up or an
        example is damaged while writing.
    """
    final = check_place(original, data_path, overwrite)
    partial = final.with_name(f".{final.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                for left in partial.iterdir():  # of a process that was killed
                    left.unlink()
                _write_files(original, partial, progress)
                counts = {
                    split: len(
                        Records(partial, original.name, split, "report this defect")
                    )
                    for split in original.splits
                }
                _replace(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(
            f"cannot write to {final}: {error.strerror or error}"
        ) from error
    return final, counts


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; ends with this one, however it ends."""
    from nmjax.training.run_folder import take_lock  # loads jax

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        free = take_lock(descriptor)
        # Its owner may have moved it into place meanwhile.
        there = folder.exists() and os.path.samestat(
            os.fstat(descriptor), folder.stat()
        )
        if not (free and there):
            raise DataError(f"another process writes in {folder.parent}")
        yield
    finally:
        os.close(descriptor)


def check_place(original: Original, data_path: Path, overwrite: bool) -> Path:
    """Returns DIR/NAME/VERSION if the set can be written there, else raises."""
    final = data_path / original.name / original.version
    existing = next(path for path in (final, *final.parents) if path.exists())
    if not existing.is_dir():
        raise DataError(
            f"cannot write to {final}: {existing} is a file, not a directory"
        )
    if existing == final:
        if not overwrite:
            raise DataError(f"{final} exists; give --overwrite to replace it")
        existing = final.parent
    if not os.access(existing, os.W_OK):
        raise DataError(f"cannot write to {final}: no permission in {existing}")
    free = shutil.disk_usage(existing).free
    if free < original.size:
        raise DataError(
            f"{original.name} needs about {original.size / 1e6:,.1f} MB in {data_path},"
            f" where {free / 1e6:,.1f} MB are free"
        )
    return final


def _write_files(original: Original, folder: Path, progress: bool) -> None:
    """Writes the records of every split, and the metadata."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(original.features)
    names = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder),
        dataset_name=original.name,
        filetype_suffix="array_record",
    )
    infos = []
    for split, examples in original.splits.items():
        files, lengths = _write_records(features, examples, folder, split, progress)
        template = names.replace(split=split)
        size = sum(file.stat().st_size for file in files)
        for index, file in enumerate(files):
            # Only now is it known of how many files each is one.
            file.rename(
                template.sharded_filepath(shard_index=index, num_shards=len(files))
            )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths,
                num_bytes=size,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=original.version,
        filename_template=names,
        check_data=False,
        **original.about,
    )


def _write_records(
    features, examples: Examples, folder: Path, split: str, progress: bool
) -> tuple[list[Path], list[int]]:
    """Writes one split to numbered files; returns them and their record counts."""
    from tqdm import tqdm

    files: list[Path] = []
    lengths: list[int] = []
    with tqdm(
        examples.read(),
        desc=split,
        total=examples.count,
        unit=" images",
        disable=not progress,
    ) as bar:
        records = (features.serialize_example(example) for example in bar)
        while True:
            file = folder / f"{split}.{len(files)}"
            length = _write_file(file, records)
            if length == 0:
                break
            files.append(file)
            lengths.append(length)
    file.unlink()
    if not files:
        raise DataError(f"there are no images for the split {split!r}")
    if sum(lengths) != examples.count:
        logging.warning(
            "the published split %r has %s images, here are %s",
            split,
            f"{examples.count:,}",
            f"{sum(lengths):,}",
        )
    return files, lengths


def _write_file(path: Path, records: Iterator[bytes]) -> int:
    """Fills one file from the records; returns how many it took (0: none were left)."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a chunk: reading any record then reads no other.
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    count = size = 0
    try:
        for record in records:
            writer.write(record)
            count += 1
            size += len(record)
            if size >= SHARD_BYTES:
                break
        writer.close()  # what went wrong in writing is reported here
    except RuntimeError as error:
        raise DataError(f"cannot write {path.parent}: {error}") from error
    return count


def _replace(new: Path, final: Path) -> None:
    """Renames a finished directory into place, over an old one if there is one."""
    if not final.exists():
        new.rename(final)
        return
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
