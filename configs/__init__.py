"""What mergemill ships beside its code: cluster files, and recipes as examples. Constraints are not shipped."""
