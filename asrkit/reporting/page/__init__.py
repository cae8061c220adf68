"""The parts of the report that `asrkit report` writes: one HTML file that needs no server and no network."""
