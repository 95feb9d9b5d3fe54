"""The phone of telecom's customer: which of its tools shows or changes what, and what their outputs say.

A library, used by tau2_users.py.
"""

from __future__ import annotations

import re
from typing import Any

_TOGGLE_TOOLS = {
    "airplane": "toggle_airplane_mode",
    "data": "toggle_data",
    "roaming": "toggle_roaming",
    "saver": "toggle_data_saver_mode",
    "wifi": "toggle_wifi",
    "wifi_calling": "toggle_wifi_calling",
}
CHECK_TOOLS = {
    "airplane": "check_network_status",
    "data": "check_network_status",
    "roaming": "check_network_status",
    "network": "check_network_status",
    "status_bar": "check_status_bar",
    "sim": "check_sim_status",
    "saver": "check_data_restriction_status",
    "vpn": "check_vpn_status",
    "mode": "check_network_mode_preference",
    "apn": "check_apn_settings",
    "wifi": "check_wifi_status",
    "wifi_calling": "check_wifi_calling_status",
    "permissions": "check_app_permissions",
    "apps": "check_installed_apps",
    "payment": "check_payment_request",
    "speed": "run_speed_test",
    "mms": "can_send_mms",
}
_MESSAGING = {"app_name": "messaging"}
Call = tuple[str, dict[str, Any]]


def check_call(topic: str) -> Call:
    """The phone action that shows the topic's state."""
    return CHECK_TOOLS[topic], (_MESSAGING if topic == "permissions" else {})


def switch_call(topic: str, wanted: str) -> Call:
    """The phone action that turns something "on" or "off"."""
    if topic == "vpn":
        return ("connect_vpn" if wanted == "on" else "disconnect_vpn"), {}
    return _TOGGLE_TOOLS[topic], {}


def action_calls(topic: str, text: str) -> list[Call]:
    """Phone actions for everything that is neither a switch nor a payment. text: of the request."""
    if topic == "sim":
        return [("reseat_sim_card", {}), ("check_sim_status", {})]
    if topic == "apn":
        return [("reset_apn_settings", {})]
    if topic == "mode":
        return [("set_network_mode_preference", {"mode": _wanted_mode(text)})]
    if topic == "permissions":
        named = [p for p in ("storage", "sms") if p in text] or ["storage", "sms"]
        return [("grant_app_permission", {**_MESSAGING, "permission": permission}) for permission in named]
    return [("reboot_device", {})]


def _wanted_mode(text: str) -> str:
    text = re.sub(r"\b(from|instead of|rather than|not|is) ([23]g( only)?( or | ?/ ?|, )?)+", " ", text)
    named = set(re.findall(r"\b([2-5])g\b", text))
    if named and named <= {"2", "3"}:
        return f"{max(named)}g_only"
    return "4g_only" if "4g only" in text else "4g_5g_preferred"


def read_phone(tool: str, output: str) -> dict[str, str]:
    """Facts that one tool output states, for example {"airplane": "off", "signal": "good"}."""
    facts: dict[str, str] = {}
    if "Status Bar:" in output:
        facts |= _read_status_bar(output.split("Status Bar:", 1)[1])
    for topic, label in (("airplane", "Airplane Mode"), ("data", "Mobile Data"), ("roaming", "Data Roaming")):
        facts |= _read_switch(topic, label, output)
    for topic, label in (("saver", "Data Saver [Mm]ode"), ("wifi_calling", "Wi-Fi Calling"), ("vpn", "VPN")):
        facts |= _read_switch(topic, label, output)
    if match := re.search(r"^Wi-Fi(?: Radio:)?(?: is(?: now| turned)?)? (ON|OFF)", output, re.M):
        facts["wifi"] = match[1].lower()
    for fact, pattern in _READ.items():
        if match := re.search(pattern, output):
            facts[fact] = match[1]
    return facts | _read_special(tool, output)


_READ = {
    "sim": r"SIM Card Status: (\w+)",
    "signal": r"Cellular Signal: (\w+)",
    "mode": r"Network Mode (?:Preference|set to): (\w+)",
    "apn": r"APN Name: (\S+)",
    "mmsc": r"MMSC URL[^:]*: (\S+)",
    "speed": r"Speed (?:Test Result|test failed): (.+?)\.(?: |$)",
    "request": r"payment request for (bill \S+ of \S+)",
    "paid": r"Payment of (\S+) USD has been made",
    "apps": r"apps are installed on the phone: (.+)",
    "granted": r"has permission for: (.+?)\.",
}


def _read_switch(topic: str, label: str, output: str) -> dict[str, str]:
    match = re.search(rf"{label}(?: Enabled)?(?::| is)?(?: now| currently| turned)* (ON|OFF|Yes|No)\b", output)
    return {topic: "on" if match[1] in ("ON", "Yes") else "off"} if match else {}


def _read_status_bar(bar: str) -> dict[str, str]:
    if "Airplane Mode" in bar:
        return {"signal": "none", "airplane": "on"}
    strength = re.search(r"No Signal|Poor|Fair|Good|Excellent", bar)
    signal = "none" if strength is None or strength[0] == "No Signal" else strength[0].lower()
    return {"signal": signal, "airplane": "off", "bar_data": "on" if "Data Enabled" in bar else "off"}


def _read_special(tool: str, output: str) -> dict[str, str]:
    if tool == "check_sim_status" and "No SIM card" in output:
        return {"sim": "missing"}
    if tool == "check_sim_status":
        locked = re.search(r"locked with a (PIN|PUK)", output)
        return {"sim": f"locked_{locked[1].lower()}" if locked else "active"}
    if tool == "can_send_mms":
        return {"mms": "no" if "cannot" in output else "yes"}
    if tool == "disconnect_vpn":
        return {"vpn": "off"}
    if tool == "connect_vpn":
        return {"vpn": "on" if "No VPN" not in output else "off"}
    if tool == "check_app_permissions" and "no permissions" in output:
        return {"granted": ""}
    if tool == "check_payment_request" and "No payment" in output:
        return {"request": ""}
    if tool == "make_payment" and "do not have" in output:
        return {"paid": ""}
    return {}
