"""The key between a provider's and those of shards: one for each group of a split's columns."""

from __future__ import annotations

from typing import Self

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import DataKey, KeyProvider, WrappedKey


class PartitionKey:
    """Wraps and unwraps the data keys of one partition's shards.

    Args:
        key: The key itself.
        dataset_id: 16 bytes.
        partition: Name of the partition.

    >>> partition, wrapped = PartitionKey.create(bytes(16), "train", keys)
    >>> [one.key_id for one in wrapped] == list(keys.recipients)
    True
    """

    def __init__(self, key: DataKey, *, dataset_id: bytes, partition: str) -> None:
        self._key = key
        self._dataset_id = dataset_id
        self._partition = partition

    @classmethod
    def create(
        cls, dataset_id: bytes, partition: str, keys: KeyProvider
    ) -> tuple[Self, tuple[WrappedKey, ...]]:
        """Make a fresh partition key; return it, and for the manifest its form per recipient."""
        made = cls.generate(dataset_id, partition)
        return made, made.wrapped_for(keys)

    @classmethod
    def generate(cls, dataset_id: bytes, partition: str) -> Self:
        """Make a fresh partition key that no recipient has yet."""
        return cls(DataKey.generate(), dataset_id=dataset_id, partition=partition)

    def wrapped_for(self, keys: KeyProvider) -> tuple[WrappedKey, ...]:
        """Return this key under a provider's own: that provider's holder becomes a recipient."""
        context = partition_context(self._dataset_id, self._partition)
        return keys.wrap_all(self._key, context=context)

    def seal(self, key: DataKey, *, shard_uuid: bytes) -> bytes:
        """Wrap a shard's data key."""
        return self._key.wrap(key, context=self.context(purpose="shard", shard=shard_uuid.hex()))

    def open(self, entry: ShardEntry) -> DataKey:
        """Unwrap a shard's data key.

        Raises:
            IntegrityError: if the wrapped key was altered or belongs to another shard.
        """
        return self._key.unwrap(
            entry.wrapped_key, context=self.context(purpose="shard", shard=entry.uuid.hex())
        )

    def seal_subject_key(self, key: DataKey) -> bytes:
        """Wrap the key that makes the ids of the partition's subjects into pseudonyms."""
        return self._key.wrap(key, context=self.context(purpose="subjects"))

    def open_subject_key(self, wrapped: bytes) -> DataKey:
        """Unwrap the key of the subjects' pseudonyms.

        Raises:
            IntegrityError: if the wrapped key was altered or belongs to another partition.
        """
        return self._key.unwrap(wrapped, context=self.context(purpose="subjects"))

    def subkey(self, purpose: str) -> DataKey:
        """Return a key for something else than shards, see :meth:`DataKey.subkey`."""
        return self._key.subkey(purpose)

    def context(self, **use: str) -> dict[str, str]:
        """Return what something under this key is bound to: the partition, and its use."""
        return {"dataset": self._dataset_id.hex(), "partition": self._partition, **use}


def partition_context(dataset_id: bytes, partition: str) -> dict[str, str]:
    """Return what a wrapped partition key is bound to."""
    return {"purpose": "partition", "dataset": dataset_id.hex(), "partition": partition}
