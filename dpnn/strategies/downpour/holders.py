"""Which server holds which shard, and which mirrors it: known to all from who has died, whatever the order."""

from dpnn.errors import RankError


class Holders:
    """Of as many shards as `servers`. Shard k is held by server k, or the next one that lives; the next mirrors it.

    Where shards aren't `mirrored`, none outlives its server.
    """

    def __init__(self, servers: int, mirrored: bool) -> None:
        self._servers, self._mirrored = servers, mirrored
        self.dead: set[int] = set()
        """Servers that have died."""

    def of(self, shard: int) -> int:
        """Who holds a shard. RankError where that is nobody."""
        after = self._living_from(shard)
        if not after or (shard in self.dead and not self._mirrored):
            raise RankError(
                f"server {shard} has died, and its parameters with it; go on from the last checkpoint with --resume"
            )
        return after[0]

    def mirror(self, shard: int) -> int | None:
        """Who mirrors a shard; None: nobody."""
        after = self._living_from(shard)
        return after[1] if self._mirrored and len(after) > 1 else None

    def held_by(self, server: int) -> list[int]:
        """The shards that a server holds."""
        return [shard for shard in range(self._servers) if self._living_from(shard)[:1] == [server]]

    @property
    def lost(self) -> bool:
        """Whether a shard is nobody's."""
        return bool(self.dead) and (not self._mirrored or len(self.dead) == self._servers)

    def _living_from(self, shard: int) -> list[int]:
        around = (server % self._servers for server in range(shard, shard + self._servers))
        return [server for server in around if server not in self.dead]
