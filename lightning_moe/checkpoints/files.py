"""Names of the files of a sharded checkpoint, which is a folder, beside its shards."""

INDEX = ".metadata"  # torch's: which tensor lies where in which shard
HEADER = "meta.pt"  # Lightning's: the checkpoint without weights and optimizer state
CHECKSUMS = "checksums.json"  # of all other files
