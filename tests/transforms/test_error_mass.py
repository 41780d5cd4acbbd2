"""Steps over the mean probability of error, and the paper's perceptron table."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false


# The paper's worst case: labels times inputs, of which one disagrees with the rest.
