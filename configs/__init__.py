"""The config hub, installed as ``lightning_difftune.configs`` so that a wheel brings it along."""
