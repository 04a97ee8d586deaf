"""From files to batches: named -> rows -> text -> prepare -> shards -> batches."""
