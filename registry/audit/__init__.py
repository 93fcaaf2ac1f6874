"""Upkeep: whether all of it still agrees (fsck), mending what can be mended, collecting, backing up, the doctor."""
