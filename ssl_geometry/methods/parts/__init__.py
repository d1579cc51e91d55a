"""What methods are put together from: losses, teachers, queues, prototypes, optimisers, evaluation."""
