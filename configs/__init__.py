"""What mergemill ships beside its code: the prices of object storage. Recipes and constraints here are not shipped."""
