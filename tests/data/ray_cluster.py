"""What test_ray.py runs in a process of its own: a local Ray of two workers, and three writes."""

# ruff: noqa: T201, BLE001
from __future__ import annotations

import os
import pathlib
import signal
import sys
import tempfile

import numpy as np


def rows(batch):
    numbers = batch["data"][:, 0, 0]
    ragged = np.empty(len(numbers), dtype=object)
    ragged[:] = [np.arange(1 + n % 3) for n in numbers]
    return {"y": numbers, "x": batch["data"], "s": [f"row {n}" for n in numbers], "r": ragged}


def spoiled(batch):
    texts = [f"row {n}" if n != 1500 else None for n in batch["y"]]
    return {"y": batch["y"], "s": texts}


def listening(word: str) -> set[str]:
    """Return the addresses on which the processes with ``word`` in their command listen."""
    ours = set()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            if word in command or process.name == str(os.getpid()):
                ours |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
                address = bytes.fromhex(fields[1].split(":")[0][-8:])[::-1]
                found.add(".".join(map(str, address)))
    return found


def main(root: pathlib.Path, key_file: str) -> None:
    import ray
    import ray.data
    from ray._common.usage import usage_lib

    from lightning_secure import EncryptedShardDatasink, LocalKeyProvider

    class Dying(EncryptedShardDatasink):
        """Its first two tries end with a kill, when some of the task's shards are written."""

        def write(self, blocks, ctx):
            def deadly():
                for block in blocks:
                    yield block
                    for n in range(2):
                        try:
                            os.close(os.open(root / f"kill-{n}", os.O_CREAT | os.O_EXCL))
                        except FileExistsError:
                            continue
                        assert any(self._folder.glob("*.lsec")), "nothing was written yet"
                        os.kill(os.getpid(), signal.SIGKILL)

            return super().write(deadly(), ctx)

    def sink(name: str, kind=EncryptedShardDatasink):
        keys = LocalKeyProvider(key_file)
        return kind(root / name, split="train", keys=keys, segment_bytes=256, shard_bytes=1024)

    tensors = ray.data.range_tensor(2000, shape=(2, 3), override_num_blocks=4)
    table = tensors.map_batches(rows).materialize()
    print("usage:", usage_lib.usage_stats_enabled())

    table.write_datasink(sink("plain"))

    labels = table.select_columns(["y", "s"])
    labels.write_datasink(sink("killed", Dying))
    print("killed:", len(list(root.glob("kill-*"))))

    try:
        labels.map_batches(spoiled).write_datasink(sink("failed"))
    except Exception as error:
        print("failed:", "null in row" in str(error))


if __name__ == "__main__":
    import ray
    import ray.data

    with tempfile.TemporaryDirectory(prefix="lsec") as session:
        ray.init(
            num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=session,
            object_store_memory=100 * 2**20, log_to_driver=False, configure_logging=False,
        )  # fmt: skip
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        print("listening:", sorted(listening(session)))
        main(pathlib.Path(sys.argv[1]), sys.argv[2])
        ray.shutdown()
