"""What each layer costs under each scheme: one file a method, all of them into one table of `Scores`."""
