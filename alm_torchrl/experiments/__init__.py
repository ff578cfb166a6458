"""The paper's experiments: what to run, and tables and figures of what came out."""
