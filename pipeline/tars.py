"""Tar shards in memory: written with equal bytes for equal members, with the members' offsets."""

import io
import tarfile


class TarWriter:
    """Writes the members of one shard.

    A shard is bounded in size by its work item, so it is built in memory and published in one
    piece. Times, owners and modes are constant, hence equal members give equal bytes.
    """

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        # Closed by close(), which returns what was written.
        self._tar = tarfile.open(  # noqa: SIM115
            fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT
        )

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return where its data begin in the tar, in bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def close(self) -> bytes:
        """Finish the archive and return it."""
        self._tar.close()
        return self._buffer.getvalue()
