"""What mergemill ships beside its code: files of clusters. Recipes and constraints here are not shipped."""
