"""One exchange, from admission to its last byte, and the state of the appliance around it."""
