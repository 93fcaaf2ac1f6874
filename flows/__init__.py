"""What runs, and when: pipeline specs, the main path, plans, retraining, promotion, the command line."""
