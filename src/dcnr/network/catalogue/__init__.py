"""The catalogue's entries, one file per family; :mod:`dcnr.network.types` joins them."""
