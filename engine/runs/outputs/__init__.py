"""Where a merge is written and noted: a folder, objects of S3 or of any store, a repository of the Hub."""
