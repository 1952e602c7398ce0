"""YAML whose brackets are nested to a bound: PyYAML looks at all that are open, at every word within them."""

import yaml

MOST_DEPTH = 50  # of brackets; ten times what a recipe or a card has


class ShallowLoader(yaml.SafeLoader):
    """PyYAML's safe loader, in time that is linear in what it reads; a `yaml.YAMLError` for deeper brackets."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Note a bracket."""
        if self.flow_level >= MOST_DEPTH:
            words = f"brackets are nested more than {MOST_DEPTH} deep"
            raise yaml.scanner.ScannerError(None, None, words, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)
