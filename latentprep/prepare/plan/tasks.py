"""What the text encoders are to do, one shard or cond file at a time, and where cond is that is there already."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from latentprep.cache.names import text_name
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp
from latentprep.records import Row


@dataclass(frozen=True)
class Home:
    """A text file of the cache that has the cond of a prompt."""

    shard: str  # its id
    text_id: str
    stamp: Stamp

    @property
    def name(self) -> str:
        return text_name(self.shard, self.text_id)


Homes = Mapping[str, Home]  # prompt -> where its cond can be taken from
Borrowed = Mapping[str, tuple[str, int]]  # prompt -> the cond file that has its cond, and the row in it


@dataclass(frozen=True)
class CondTask:
    """Prompts that several shards have, whose cond becomes a file: texts borrow it from there."""

    id: str
    prompts: tuple[str, ...]
    number: int = 0  # in its plan
    homes: Homes = field(default_factory=dict)


@dataclass(frozen=True)
class TextTask:
    """A shard that gets a text file. Cond in its present one is used again."""

    shard: Shard
    rows: tuple[Row, ...]  # what the new file says
    number: int = 0  # in its plan
    homes: Homes = field(default_factory=dict)
    borrowed: Borrowed = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.shard.id
