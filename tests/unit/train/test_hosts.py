import pytest
from tokar.train.hosts import FIRST_PORT, PORTS, default_port, expand


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("127.0.0.[11-12]", ["127.0.0.11", "127.0.0.12"]),
        ("rack[1-2]-n[0,3]", ["rack1-n0", "rack1-n3", "rack2-n0", "rack2-n3"]),
        ("n[098-101]x", ["n098x", "n099x", "n100x", "n101x"]),
        ("a,b-[1-2].c", ["a", "b-1.c", "b-2.c"]),
    ],
)
def test_the_short_form_of_host_names_is_expanded(short, hosts):
    assert expand(short) == hosts


@pytest.mark.parametrize("broken", ["", "gpu[1-2", "gpu[a-b]", "gpu[]"])
def test_what_is_no_list_of_hosts_is_refused(broken):
    with pytest.raises(ValueError, match=r"no list of nodes|invalid literal"):
        expand(broken)


def test_ports_differ_between_jobs_and_stay_below_those_that_the_system_hands_out():
    ports = {default_port(job) for job in range(PORTS)}
    assert len(ports) == PORTS
    assert (min(ports), max(ports)) == (FIRST_PORT, FIRST_PORT + PORTS - 1)
    assert max(ports) < 32768 - 256
