"""The demo: a real model explained and steered on this machine."""
