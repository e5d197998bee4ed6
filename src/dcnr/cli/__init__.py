"""The command line: thin commands over the client library, each importing what it needs when it runs."""
