"""What training a routed model on transformers' `Trainer` is made of; see `polyroute.trainer`."""
