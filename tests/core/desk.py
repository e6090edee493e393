"""Requests as clients send them, and the packs of answers."""

from pkvpn.protocol import http
from pkvpn.protocol.hashes import secure_password, user_key
from pkvpn.protocol.messages import AdditionalConnect, AuthType, Login
from pkvpn.protocol.pack import Pack

RANDOM = bytes(range(20))
# From the specification: what the stock client of user u1, password pw1 sends for RANDOM.
S_OF_U1 = bytes.fromhex("1e9d2e20b76071f3d4b08ea984c3cb710723825f")


def post(target: str, body: bytes, kind: str = http.PACK_TYPE) -> bytes:
    return http.build_request("POST", target, host="10.98.0.1", content_type=kind, body=body)


def get(target: str, *headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: 10.98.0.1", *headers, "", ""]
    return "\r\n".join(lines).encode()


PROBE = get("/", "X-VPN: 1")
SIGNATURE = post(http.CONNECT_TARGET, http.SIGNATURE, http.IMAGE_TYPE)

# The login of u1 into hub T, five elements, for RANDOM: from the specification.
LOGIN_OF_THE_SPEC = post(
    http.VPN_TARGET,
    bytes.fromhex(
        "00000005 00000007 6d6574686f64 00000002 00000001 00000005 6c6f67696e"
        "00000008 6875626e616d65 00000002 00000001 00000001 54"
        "00000009 757365726e616d65 00000002 00000001 00000002 7531"
        "00000009 6175746874797065 00000000 00000001 00000001"
        "00000010 7365637572655f70617373776f7264 00000001 00000001 00000014"
        "1e9d2e20b76071f3d4b08ea984c3cb710723825f"
    ),
)


def pack_request(pack: Pack) -> bytes:
    return post(http.VPN_TARGET, pack.encode())


def login(
    user: str = "u1",
    password: str = "pw1",
    hub: str = "T",
    *,
    random: bytes = RANDOM,
    plain: bool = False,
    **fields: object,
) -> bytes:
    key = user_key(password, user)
    wanted = Login(
        hub,
        user,
        AuthType.PLAIN_PASSWORD if plain else AuthType.PASSWORD,
        secure_password=secure_password(key, random),
        plain_password=password,
        **fields,  # type: ignore[arg-type]
    )
    return pack_request(wanted.to_pack())


def additional(key: bytes) -> bytes:
    return pack_request(AdditionalConnect(key).to_pack())


def read(reply: bytes) -> http.Response:
    cutter = http.ResponseCutter()
    cutter.feed(reply)
    response = cutter.cut()
    assert response is not None
    assert cutter.rest() == b""
    return response


def pack_of(reply: bytes) -> Pack:
    response = read(reply)
    assert response.is_pack
    return Pack.decode(response.body)
