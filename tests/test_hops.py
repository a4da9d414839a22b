"""The main path is short: from the command to the bytes of cache.json, and of a shard."""

import traceback
from pathlib import Path

import latentprep
from latentprep.cache.storage import Storage
from tests.conftest import SMALL

PACKAGE = str(Path(latentprep.__file__).parent)


def test_at_most_six_hops_from_the_command_to_the_bytes(run, images, tmp_path, monkeypatch):
    """All functions of the package that stand one below the other, down to the call of write_atomic."""
    stacks, write = {}, Storage.write_atomic

    def recorded(self, name, data):
        frames = [f for f in traceback.extract_stack()[:-1] if f.filename.startswith(PACKAGE)]
        stacks[name] = [f"{Path(f.filename).relative_to(PACKAGE).with_suffix('')}.{f.name}" for f in frames]
        return write(self, name, data)

    monkeypatch.setattr(Storage, "write_atomic", recorded)
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    chain = stacks["cache.json"]
    command = chain.index("cli/commands.encode")
    assert chain[:command] == ["cli/commands.main", "cli/face.command"]  # of every command
    assert chain[command:] == [
        "cli/commands.encode", "api.encode", "runs.run_encode", "prepare/encode.encode", "prepare/finish.finish",
        "cache/manifest.commit",
    ]  # fmt: skip
    shard = next(stacks[name] for name in stacks if name.endswith(".latents.safetensors"))
    assert shard == ["prepare/work/finish._write", "cache/latents.write_latents"]
