"""Ordinary wordings of an agent, and what the scripted customer hears in them: "topic action, topic action"."""

WORDINGS = {
    "Could you please check the status bar at the top of your phone and tell me what you see?": "status_bar check",
    "Please go to Settings > Network & Internet and toggle Airplane Mode off.": "airplane off",
    "Please toggle airplane mode on and then off again.": "airplane on, airplane off",
    "Please make sure that airplane mode is turned off.": "airplane off",
    "Please make sure airplane mode isn't on.": "airplane off",
    "Can you confirm that mobile data is turned on? If not, please enable it.": "data on",
    "If mobile data is disabled, please enable it.": "data on",
    "Is data roaming enabled on your device? If not, could you turn it on?": "roaming on",
    "Check whether Data Saver is enabled; if so, disable it.": "saver off",
    "If Data Saver mode is ON, turn it OFF.": "saver off",
    "Turn off Data Saver if it's on.": "saver off",
    "Please turn off your VPN if you're using one.": "vpn off",
    "Are you connected to a VPN? If so, please disconnect from it and run a speed test again.": "vpn off, speed check",
    "Please remove and re-insert your SIM card.": "sim do",
    "Is the SIM card properly inserted?": "sim check",
    "Please check your SIM card status.": "sim check",
    "Could you reset your APN settings to default and then reboot your phone?": "apn do, restart do",
    "Let's try resetting your APN settings. Can you reset them and then restart your phone?": "apn do, restart do",
    "Please grant the messaging app both SMS and storage permissions.": "permissions do",
    "Please make sure your messaging app has the storage and SMS permissions.": "permissions do",
    "Can you check what app permissions the messaging app has?": "permissions check",
    "Please turn off Wi-Fi calling and try sending an MMS again.": "wifi_calling off, mms check",
    "Please disable Wi-Fi Calling in your settings and try sending a picture message.": "wifi_calling off, mms check",
    "Wi-Fi calling may be interfering with MMS. Could you turn it off?": "wifi_calling off",
    "Your network mode is set to 2G only, which is too slow. Please change it to 4G/5G preferred.": "mode do",
    "Please change your network mode preference from 3G to 4G/5G.": "mode do",
    "Could you check which network mode your phone is set to?": "mode check",
    "Please check the payment request and pay the bill.": "payment check, payment do",
    "Would you like to pay your overdue bill of $55.00? I can send you a payment request.": "payment do",
    "I see that you have an overdue bill of $55. Would you like me to send a payment request?": "payment agree",
    "You have used all your data. I can refuel 2 GB of data for $4.00. Would you like to proceed?": "refuel check",
    "Would you like to add 2.0 GB of data at $2.00 per GB, for a total of $4.00?": "refuel check",
    "Your line has been resumed. Please reboot your device to restore service.": "restart do",
    "Please restart your phone and check if your service is back.": "restart do, status_bar check",
    "Please restart your phone and let me know if the signal returns.": "restart do, status_bar check",
    "Can you try sending an MMS now and tell me if it works?": "mms check",
    "Does it work now?": "resolved check",
    "Has this resolved your issue?": "resolved check",
    "Is there anything else I can help you with?": "resolved check",
    "Are you currently traveling abroad or outside your home country?": "abroad check",
    "I've enabled roaming on your line. Please also make sure data roaming is turned on on your phone.": "roaming on",
    "Roaming is now enabled on your account. Now please run a speed test.": "speed check",
    "Please turn your phone off and then on again.": "restart do",
    "Please don't turn off airplane mode yet. First check your SIM card.": "sim check",
    "Before we restart your phone, please reset the APN settings.": "apn do",
    "After you've turned off airplane mode, check the status bar.": "airplane off, status_bar check",
    "Once you have turned Data Saver off, run a speed test again.": "saver off, speed check",
    "Try turning off your VPN.": "vpn off",
    "I recommend turning off Data Saver and switching the network mode to 5G.": "saver off, mode do",
    "You'll need to turn on mobile data and data roaming.": "data on, roaming on",
    "You should grant the SMS permission to the messaging app.": "permissions do",
    "Let's turn off the VPN and see whether the speed improves.": "vpn off",
    "Let's check your APN settings. Please tell me whether the MMSC URL is set.": "apn check",
    "Go ahead and disconnect the VPN, then do a speed test.": "vpn off, speed check",
    "To fix this, navigate to Settings → Cellular → Data Roaming and switch it on.": "roaming on",
    "Could you tell me if airplane mode is on or off?": "airplane check",
    "Is airplane mode on or off?": "airplane check",
    "Ensure that Data Saver is disabled and VPN is disconnected.": "saver off, vpn off",
    "Switch your preferred network type to 5G.": "mode do",
    "Toggle mobile data off and back on.": "data off, data on",
    "Toggle data roaming.": "roaming check",
    "It looks like Airplane Mode is turned on. Please turn it off.": "airplane off",
    "Airplane mode is on, so please turn it off.": "airplane off",
    "Since you're abroad, data roaming needs to be enabled. Please turn it on.": "roaming on",
    "Because your network mode is 2G, please switch to 5G.": "mode do",
    "The VPN is connected and might be slowing your connection. Please disconnect it.": "vpn off",
    "I see that mobile data is off. Can you turn that on?": "data on",
    "Mobile data is off, which is the cause. Please enable it and run a speed test.": "data on, speed check",
    "Please re-enable mobile data.": "data on",
    "Kindly deactivate Data Saver.": "saver off",
    "Please give it storage permission.": "permissions do",
    "Please allow the messaging app to access storage and SMS.": "permissions do",
    "Please check (1) your mobile data status and (2) your data roaming status.": "data check, roaming check",
    "Please run a speed test to see if your data is working.": "speed check, data check",
    "What's your current network mode preference?": "mode check",
    "Please check your data usage.": "",
    "Is Wi-Fi on?": "wifi check",
    "I'm going to transfer you to a human agent.": "",
    "It seems your SIM card is missing. Please reseat it and check the status bar again.": "sim do, status_bar check",
    "If the SIM shows as missing, try re-seating it.": "sim do",
    "If there's no signal, please reset your APN settings and restart your phone.": "apn do, restart do",
    "If the problem persists, please restart your phone.": "restart do",
    "Please select LTE/5G as the preferred network.": "mode do",
    "Set it to 4G/5G preferred.": "mode do",
    "Please change the network mode to the highest available (4G/5G).": "mode do",
    "Please set network mode to 5G instead of 3G.": "mode do",
    "Please make sure that Airplane Mode is not enabled.": "airplane off",
    "Please make sure Data Saver isn't enabled.": "saver off",
    "Please make sure you are not connected to a VPN.": "vpn off",
    "Make sure that the VPN is not active, then run a speed test.": "vpn off, speed check",
    "Please ensure Wi-Fi calling is not turned on.": "wifi_calling off",
    "Please make sure Data Saver mode is not on.": "saver off",
    "Airplane mode should not be on.": "airplane off",
    "Airplane mode should be off.": "airplane off",
    "We need to reset your APN settings. Please do so now.": "apn do",
    "We need to turn off Data Saver.": "saver off",
    "Next, we should disconnect your VPN.": "vpn off",
    "I suggest turning off Wi-Fi calling.": "wifi_calling off",
    "I'd recommend disabling the VPN and then running a speed test.": "vpn off, speed check",
    "I need you to turn off the VPN.": "vpn off",
    "Let me guide you: turn off airplane mode.": "airplane off",
    "Let me know if airplane mode is on.": "airplane check",
    "Let me know what the status bar shows.": "status_bar check",
    "Let me know whether mobile data is on and roaming is on.": "data check, roaming check",
    "Please turn off the VPN and let me know when that's done.": "vpn off",
    "Please check your status bar and let me know if you have signal.": "status_bar check",
    "If your network mode is set to 2G or 3G, please change it to 4G/5G.": "mode do",
    "If it's set to 2G only or 3G only, please change it to 4G/5G.": "mode do",
    "Please check your network mode preference. If it is set to 2G or 3G, change it to 4G/5G preferred.": "mode do",
    "Check the network mode preference. It should be set to 4G/5G.": "mode do",
    "Check your network mode preference and change it to 4G/5G preferred if it's not already.": "mode do",
    "Could you tell me what network mode preference is set on your phone?": "mode check",
    "What is your preferred network type set to?": "mode check",
    "Please check what your network mode preference is set to.": "mode check",
    "Don't forget to restart your phone afterwards.": "restart do",
    "Reset the APN settings, and don't forget to reboot your phone.": "apn do, restart do",
    "Please disconnect the VPN and run a speed test without it.": "vpn off, speed check",
    "VPN connections can slow down your speed. Please disconnect it.": "vpn off",
    "Data Saver mode can limit your mobile data. Please turn it off.": "saver off",
    "Data Saver limits mobile data usage, so please turn it off and rerun the speed test.": "saver off, speed check",
    "Turning on airplane mode disables mobile data. Please turn it off.": "airplane off",
    "Wi-Fi Calling can interfere with MMS messages. Please disable it.": "wifi_calling off",
    "Could you please provide your phone number so I can look up your account?": "identity check",
    "To assist you, I'll need your phone number.": "identity check",
    "May I have your full name and date of birth?": "identity check",
    "Please pay the bill.": "payment do",
    "You'll receive a payment request shortly. Please accept it.": "payment do",
    "The payment request has been sent. Please check your phone and complete the payment.": "payment do",
    "I've sent the payment request for $100. Please confirm once it is paid.": "payment do",
    "Please make the payment and let me know once done.": "payment do",
    "Please let me know once you have made the payment.": "payment do",
    "Please approve the payment request on your phone.": "payment do",
    "Please check for the payment request and approve it.": "payment check, payment do",
    "Please go ahead and pay it.": "payment do",
    "I have sent you a payment request of $45.20. Can you please check and accept it?": "payment check, payment do",
    "I've sent a payment request. Please review and accept it.": "payment do",
    "Have you paid the bill?": "payment check",
    "Do you authorize me to send a payment request for $55?": "payment agree",
    "Your line is suspended because of an overdue bill of $55.00. Are you willing to pay it?": "payment do",
    "Are you okay with paying the bill of $55?": "payment do",
    "Would you like to refuel 2 GB of data for $4?": "refuel check",
    "Would you like to refuel your data? The cost is $2 per GB.": "refuel check",
    "How many GB would you like to refuel?": "refuel check",
    "How much data would you like to add?": "refuel check",
    "Would you like to purchase additional data?": "refuel check",
    "I can add 2.0 GB of extra data for $4.00. Shall I proceed?": "refuel check",
    "I can refuel your data with 2.0 GB for $4.00. Would you like me to do that?": "refuel check",
    "Would you like to refuel 2.0 GB of data for a total of $4.00?": "refuel check",
    "Would you like to upgrade your plan or refuel data?": "plan check, refuel check",
    "Do you want me to add 2 GB to your line?": "refuel check",
    "The refuel would cost $4.00 in total. Do you confirm?": "refuel check",
    "Would you prefer to change your plan or to refuel data?": "plan check, refuel check",
    "You can add up to 2GB of data. Would you like to do this?": "refuel check",
    "Try removing your SIM card and putting it back in.": "sim do",
    "Please take out the SIM card, wait a few seconds, and insert it again.": "sim do",
    "Please remove your SIM card, then reinsert it securely.": "sim do",
    "Please remove the SIM card. Then re-insert it.": "sim do",
    "Please turn off your phone, take out the SIM card, reinsert it, and turn your phone back on.": "sim do",
    "Please check if the SIM card is properly seated.": "sim check",
    "Let's re-seat the SIM. Please take it out and put it back.": "sim do",
    "Please restart the device now.": "restart do",
    "Please turn off your device and turn it on again.": "restart do",
    "Reboot.": "restart do",
    "Please go to Settings > Apps > Messaging > Permissions and enable SMS and Storage.": "permissions do",
    "Please enable the storage permission for your messaging app.": "permissions do",
    'Please enable "Storage" and "SMS" for the messaging app.': "permissions do",
    "The messaging app needs storage permission. Please grant it.": "permissions do",
    "The messaging app is missing the storage permission. Could you grant this permission?": "permissions do",
    "Please verify that the messaging app has SMS permission.": "permissions check",
    "Both permissions are required. Please enable both.": "permissions do",
    "Please set your network mode to 4G/5G preferred for the best speed.": "mode do",
    'Please change "Preferred network type" to "5G/LTE/3G/2G (auto connect)".': "mode do",
    "Please set the preferred network type to 5G/4G/3G/2G auto.": "mode do",
    "Set network mode to LTE.": "mode do",
    "Please switch to 4G.": "mode do",
    "Please enable 5G.": "mode do",
    "Can you run a speed test on your phone and share the result?": "speed check",
    "Could you run a speed test now?": "speed check",
    "Please try using your mobile data now and tell me whether it's working.": "data check",
    "Check that mobile data is on.": "data check",
    "Please check that your Mobile Data is turned on and your Data Roaming is turned on.": "data check, roaming check",
    "Please turn off Data Saver Mode. You can find it under Settings > Network & Internet > Data Saver.": "saver off",
    "Swipe down from the top of the screen and tap the airplane icon to turn it off.": "airplane off",
    "Can you check that you are not in airplane mode?": "airplane check",
    "Are you in airplane mode?": "airplane check",
    "Is your phone showing any signal bars?": "status_bar check",
    "Please wait while I check your account.": "",
    "One moment please while I enable roaming on your line.": "",
    "Please hold on while I check your data usage and roaming settings.": "",
    "Please give me a moment to check your mobile data plan.": "",
    "Thanks for confirming that airplane mode is off and mobile data is on. Please run a speed test.": "speed check",
    "Thank you for turning off airplane mode. Please restart your phone.": "restart do",
    "Great, data roaming is on. Now turn off Data Saver.": "saver off",
    "Since Wi-Fi calling is off, let's check your messaging app permissions.": "permissions check",
    "I understand that your mobile data is slow. Can you run a speed test?": "speed check",
    "Could you please check if data roaming is enabled on your phone, and turn it on if it is off?": "roaming on",
    "Can you check whether Data Saver is on and turn it off if it is?": "saver off",
    "Please check if airplane mode is on and turn it off if it is.": "airplane off",
    "Could you turn off airplane mode if it's on?": "airplane off",
    "Could you please turn on mobile data if it is off?": "data on",
    "Would you mind checking if airplane mode is on and, if so, turning it off?": "airplane off",
    "Make sure that both Storage and SMS are allowed.": "permissions do",
    "Make sure both the SMS and storage permissions are granted.": "permissions do",
    "Make sure airplane mode and Data Saver are off.": "airplane off, saver off",
    "Please make sure mobile data and data roaming are both turned on.": "data on, roaming on",
    "Please ensure that Wi-Fi calling is disabled and the VPN is off.": "wifi_calling off, vpn off",
    "Can you please make sure that airplane mode is off?": "airplane off",
    "Could you make sure that mobile data is turned on?": "data on",
    "Can you make sure Data Saver is turned off and run a speed test?": "saver off, speed check",
    "Could you set your network mode to 4G/5G and make sure Data Saver is off?": "mode do, saver off",
    "Is the VPN on? Please turn it off if it is.": "vpn off",
    "Please verify that data roaming is turned on; if not, switch it on.": "roaming on",
    "You have a payment request. Do you want to pay it now?": "payment do",
    "Please proceed with the payment.": "payment do",
    "Please complete the payment using the payment request I just sent.": "payment do",
    "**Step 1:** Toggle mobile data on.\n**Step 2:** Run a speed test.": "data on, speed check",
    "I'd appreciate it if you could turn on data roaming.": "roaming on",
    "If you don't mind, please restart your phone.": "restart do",
    "When you have a moment, could you reboot the device?": "restart do",
    "Would you be able to check whether Wi-Fi calling is enabled?": "wifi_calling check",
    "Were you able to turn off airplane mode?": "airplane check",
    "Have you restarted your phone?": "restart check",
    "Did you turn off Data Saver?": "saver check",
    "Is mobile data on and roaming off?": "data check, roaming check",
    "Airplane mode off?": "airplane check",
    "What happens when you turn on mobile data?": "data check",
    "Please keep airplane mode off.": "airplane off",
    "Leave Wi-Fi calling turned off and try sending an MMS.": "wifi_calling off, mms check",
    "Your mobile data is disabled. Please enable it.": "data on",
    "Data Saver is enabled, which slows things down. Kindly disable it.": "saver off",
    "I see airplane mode is off and Data Saver is on. Please turn it off.": "saver off",
    "Airplane mode is off and mobile data is off. Please turn it on.": "data on",
    "It seems roaming is disabled on your phone, so let's switch it on.": "roaming on",
    "I'll check your line and enable roaming on your line.": "",
    "I will go ahead and enable roaming for you, and then you can run a speed test.": "speed check",
    "I have enabled roaming on your account. Now, please turn on data roaming on your phone as well.": "roaming on",
    "Don't turn off airplane mode or restart your phone.": "",
    "Do not restart your phone yet; first reset the APN settings.": "apn do",
    "You don't need to turn off Wi-Fi calling.": "",
    "There's no need to restart your phone.": "",
    "Please avoid turning on the VPN.": "",
    "Make sure you don't have Data Saver on.": "saver off",
    "Make sure there is no VPN connected.": "vpn off",
    "Make sure you're not using a VPN and that Data Saver is off.": "vpn off, saver off",
    "Please ensure your phone is not in airplane mode.": "airplane off",
    "Ensure your SIM card is properly inserted.": "sim check",
    "Make sure that Data Saver on your phone is off.": "saver off",
    "Please verify Data Saver on your phone is off.": "saver check",
    "Please make sure to restart your phone afterwards.": "restart do",
    "Make sure to turn off Wi-Fi Calling, and then send a test MMS.": "wifi_calling off, mms check",
    "Please check that mobile data is on; if it isn't, turn it on.": "data on",
    "If either Data Saver or the VPN is on, please turn it off.": "saver off, vpn off",
    "If airplane mode is on, turn it off; otherwise, re-seat your SIM card.": "airplane off, sim do",
    "If the speed is still slow, disconnect the VPN and test again.": "vpn off, resolved check",
    "If that doesn't help, restart your phone.": "restart do",
    "If the MMSC URL isn't set, reset the APN settings and restart your device.": "apn do, restart do",
    "Only if you are abroad, turn on data roaming.": "roaming on",
    "Can you tell me if you're abroad, and if so, turn on data roaming?": "abroad check, roaming on",
    "Please restart your phone and turn on roaming if you're abroad.": "restart do, roaming on",
    "Check if there's any signal, and if not, restart your phone.": "status_bar check, restart do",
    "Please check whether the messaging app has SMS permission, and grant it if it doesn't.": "permissions do",
    "Reset your APN settings if the MMSC URL is not set.": "apn do",
    "Please turn on mobile data before running a speed test.": "data on, speed check",
    "Before running a speed test, make sure Data Saver is off.": "saver off, speed check",
    "Before you restart your phone, please turn off airplane mode.": "airplane off, restart do",
    "Thank you for restarting your phone. Please run a speed test.": "speed check",
    "Turning off Data Saver may help with the speed.": "",
    "How about turning off the VPN?": "vpn off",
    "Why don't you restart your phone?": "restart do",
    "Let's see whether restarting your phone helps.": "restart do",
    "Would you mind turning off Wi-Fi calling?": "wifi_calling off",
    "Could I ask you to turn off airplane mode?": "airplane off",
    "May I ask whether you are abroad?": "abroad check",
    "Can I get your phone number, please?": "identity check",
    "Shall I enable roaming on your line?": "consent check",
    "Would you like me to enable data roaming on your line?": "consent check",
    "Can I go ahead and add 2 GB of data for $10?": "refuel check",
    "I can offer you a data refuel of 2 GB at $2.00 per GB. Is that okay?": "refuel check",
    "The refuel of 2.0 GB will cost $4.00. Would you like to proceed with this?": "refuel check",
    "We can refuel 2 GB of data to your line. Do you agree?": "refuel check",
    "There is an overdue bill of $65.00. Would you like to pay it now?": "payment do",
    "I have sent the payment request. Kindly authorise it on your phone.": "payment do",
    "Please check your payment requests and, if the amount is right, approve it.": "payment check, payment do",
    "I've sent you a payment request for $65. Once you've paid, I'll resume your line.": "payment do",
    "The payment has been received. Please restart your phone.": "restart do",
    "Please don't pay the bill yet.": "",
    "Please send me a photo via MMS.": "mms check",
    "Set the preferred network to the fastest option, 5G.": "mode do",
    "Change network mode from 2G only to 4G/5G preferred.": "mode do",
    "Your phone is on 2G only. Please change it.": "mode do",
    "Which network mode is selected?": "mode check",
    "Can you see which network type your phone is using?": "mode check",
    "What type of network are you on?": "mode check",
    "Is your phone set to 2G or 3G?": "mode check",
    'Please change your network type preference to "4G/5G Preferred".': "mode do",
    "Open Settings > Apps > Messaging > Permissions and allow SMS and Storage.": "permissions do",
    "Give the messaging app access to storage.": "permissions do",
    "Could you please check the app's permissions? If storage or SMS is denied, please allow both.": "permissions do",
    "Pop the SIM card out and then put it back in, please.": "sim do",
    "Power your phone off and on again.": "restart do",
    "Please do a quick reboot.": "restart do",
    "You are not being transferred, don't worry. Please restart your phone.": "restart do",
    "Please toggle Airplane Mode ON, wait 30 seconds, then toggle it OFF.": "airplane on, airplane off",
    "Please turn on flight mode, wait ten seconds and turn it off again.": "airplane on, airplane off",
    "Turn off airplane mode\nRestart your phone\nRun a speed test": "airplane off, restart do, speed check",
    "Please confirm that your Wi-Fi is turned off.": "wifi check",
    "My records show that your data roaming is off. Could you switch it on in your phone's settings?": "roaming on",
    "Everything is set up on our end. Could you try sending a picture message once more?": "mms check",
    "I'd like you to turn the VPN off and then run another speed test.": "vpn off, speed check",
    "Next, could you double-check that Data Saver Mode is off?": "saver check",
    "Now, go to your settings and make sure that Mobile Data is toggled on.": "data on",
    "Please go ahead and turn off Data Saver, if it's currently on.": "saver off",
    "Try turning airplane mode off and see if your signal returns.": "airplane off, status_bar check",
    'Please set "Preferred network type" to "4G/5G (recommended)".': "mode do",
    "You can turn mobile data back on now.": "data on",
    "Data Saver must be disabled.": "saver off",
    "Airplane mode must be turned off for calls to work.": "airplane off",
    "Can you confirm the VPN is disconnected? If it's still connected, please disconnect it.": "vpn off",
    "Please confirm whether your phone shows 4G or 5G.": "mode check",
    "Once the restart is complete, check your status bar.": "restart do, status_bar check",
    "After the restart, please run a speed test.": "restart do, speed check",
    "After restarting, try sending an MMS.": "restart do, mms check",
    "Your APN settings may be wrong. Please reset them to the default and reboot.": "apn do, restart do",
    "Could you check the APN settings and see if the MMSC URL is filled in?": "apn check",
    "I'll send the payment request now. Please accept it when it arrives.": "payment do",
    "Let me send you a payment request for the overdue bill of $65.0.": "",
    "Would it be okay if I send you a payment request for $65?": "payment agree",
    "Is it alright if I refuel 2 GB for $4.00?": "refuel check",
    "Do I have your permission to refuel 2 GB for $4.00?": "refuel check",
    "Do I have your consent to add 2 GB of data?": "refuel check",
    "Please confirm that you want to refuel 2.0 GB for $4.00.": "refuel check",
    "Please let me know if you'd like to proceed with the refuel of 2 GB for $4.00.": "refuel check",
    "Which option do you prefer: upgrading your plan or adding 2 GB of data?": "plan check, refuel check",
    "I can help with that. What is your phone number?": "identity check",
    "Thank you. May I have your phone number to look up your account?": "identity check",
    "Can I help you with anything else?": "resolved check",
    "Is everything working now?": "resolved check",
    "I have refueled 2 GB. Please run a speed test.": "speed check",
    "I've added 2 GB to your line. Could you run a speed test?": "speed check",
    "We need to check your account first.": "",
    "We need to enable roaming on your line first.": "",
    "I need to check whether roaming is enabled on your line.": "",
    "I want to make sure airplane mode is off. Could you check?": "airplane check",
    "I'm going to turn on roaming on your line.": "",
    "Roaming has been enabled on your line. Please make sure roaming is turned on on your device too.": "roaming on",
    "Let me guide you through turning off airplane mode.": "",
    "(1) Turn off Data Saver; (2) disconnect the VPN; (3) set the network mode to 5G.": "saver off, vpn off, mode do",
    "a) Turn off Data Saver\nb) Disconnect the VPN\nc) Run a speed test": "saver off, vpn off, speed check",
    "### Steps\n1. Go to **Settings**\n2. Tap **Network & Internet**\n3. Turn **Mobile data** on": "data on",
    "Please turn *off* Data Saver and turn *on* mobile data.": "saver off, data on",
    "Please turn Wi-Fi off and then check whether mobile data works.": "wifi off, data check",
    "Please disable Wi-Fi so that we can test your mobile data.": "wifi off",
    "Don't worry about the VPN. Please check Data Saver.": "saver check",
    "Please don't change your network mode.": "",
    "I don't think airplane mode is the issue, but please check it.": "airplane check",
    "Unless you are abroad, leave roaming off.": "roaming off",
    "Please check your phone's signal and tell me whether the SIM card is detected.": "status_bar check, sim check",
    "Do you have Data Saver turned on?": "saver check",
    "Do you use a VPN? If yes, please disable it.": "vpn off",
    "Are you using a VPN? If yes, turn it off; if no, run a speed test.": "vpn off, speed check",
    "Is your mobile data on? If it's off, turn it on.": "data on",
    "Is airplane mode on? Is the SIM inserted? If not, reinsert it.": "airplane check, sim do",
    "Please set your network mode to 4G/5G if it isn't already.": "mode do",
    "Please grant storage permission if it's missing.": "permissions do",
    "If permissions are missing, please grant both the SMS and storage permissions.": "permissions do",
    "If your SIM card is locked, let me know.": "sim check",
    "If MMS still doesn't work, reset your APN settings to default and restart your phone.": "apn do, restart do",
    "If it works, great! If not, please restart your phone.": "restart do",
    "Please reinsert your SIM card if it is not detected.": "sim do",
    "The next step is to turn off Data Saver.": "saver off",
    "The first thing to do is to restart your phone.": "restart do",
    "All you need to do is turn off airplane mode.": "airplane off",
    "You have to switch off Data Saver.": "saver off",
    "It is important to turn off airplane mode.": "airplane off",
    "You'll want to turn off Wi-Fi calling.": "wifi_calling off",
    "Go to Settings and toggle off Data Saver.": "saver off",
    "Go to Settings > Network > Data Saver and turn it off.": "saver off",
    'In your settings, find "Wi-Fi calling" and make sure the switch is off.': "wifi_calling off",
    "Please deactivate the aeroplane mode.": "airplane off",
    "Please have your SIM card re-seated.": "sim do",
    "Please have a look at your network status.": "network check",
    "Please do the following: airplane mode off, mobile data on, roaming on.": "airplane off, data on, roaming on",
    "Since your SIM is fine, the next thing to check is whether airplane mode is on.": "airplane check",
    "I see you're travelling. Is data roaming switched on in your phone's settings?": "roaming check",
    "Airplane mode turns off all radios. Please check whether it is on.": "airplane check",
    "The VPN could be slowing you down; let's disconnect it and test the speed again.": "vpn off, speed check",
    "Your plan includes 5 GB of data and you've used 5.2 GB of data.": "",
    "I can see from our records that your line is suspended.": "",
    "Your bill for January is overdue. The amount due is $65.00.": "",
    "Once the payment is made, please restart your phone.": "payment do, restart do",
    "After you have paid the bill, let me know.": "payment do",
    "You'll get a payment request; don't accept it until you've checked the amount.": "",
    "Do not pay yet.": "",
    "Do you want to refuel 2 GB or change your plan?": "refuel check, plan check",
    "I recommend a refuel of 2 GB, which costs $4.00. Are you okay with that?": "refuel check",
    "Is airplane mode on? Please look at your phone's quick settings.": "airplane check",
    "It's best to keep Data Saver off and mobile data on.": "saver off, data on",
    "Please keep your phone on and don't turn off mobile data.": "",
    "Please stay on the line while I check your roaming settings.": "",
    "Please wait a moment, I'm turning on roaming for your line.": "",
    "I can turn on roaming for you. Would you like that?": "consent check",
    "Has the payment gone through?": "payment check",
    "Did restarting your phone help?": "restart check",
    "Does turning off Wi-Fi calling help?": "wifi_calling check",
    "Did turning off the VPN improve the speed?": "vpn check",
    "What did the speed test show?": "speed check",
    "Can you describe what happens when you try to send an MMS?": "mms check",
    "When did you last restart your phone?": "restart check",
    "Is there a VPN active on your phone?": "vpn check",
    "How do I know whether airplane mode is on?": "airplane check",
    "Please make sure the SIM isn't loose: remove it and put it back in.": "sim do",
    "Make sure nothing is blocking mobile data, for example Data Saver.": "data check, saver check",
    "I wonder whether the VPN is on.": "",
    "No need to turn off mobile data.": "",
    "Rather than restarting your phone, please reset the APN settings.": "apn do",
    "Instead of turning off Wi-Fi calling, let's check the app permissions.": "permissions check",
    "Never turn on Data Saver while abroad.": "",
    "Please do not change anything yet, just tell me whether Data Saver is on.": "saver check",
    "Please don't restart your phone, just check the status bar.": "status_bar check",
    "You should not turn on airplane mode.": "",
    "You shouldn't restart your phone now.": "",
    "Mobile data can't work while airplane mode is on.": "",
    "With airplane mode on, you cannot make calls.": "",
    "While airplane mode is on, mobile data is off.": "",
    "Airplane mode off means the radio is on.": "",
    "If you turn on airplane mode, you lose the signal.": "",
    "If you had restarted your phone, the APN settings would have been reset.": "",
    "Enabling data roaming allows your phone to connect abroad.": "",
    "Disabling the VPN often improves the speed.": "",
    "Data roaming lets you connect to networks abroad.": "",
    "The Data Saver feature restricts background data.": "",
    "Setting the network mode to 2G slows down your connection.": "",
    "Restarting the phone applies the APN reset.": "",
    "To turn off Data Saver, go to Settings > Network & Internet > Data Saver.": "saver off",
    "In order to turn on mobile data, swipe down and tap the icon.": "data on",
    "This requires a restart of your phone.": "",
    "I've reset the APN settings on our end. Please restart your device.": "restart do",
    "We've turned on roaming for your line.": "",
    "Roaming was off, so I turned it on for your line.": "",
    "Please check that Data Saver is off, and that the VPN is disconnected.": "saver check, vpn check",
    "Now turn mobile data off, wait 10 seconds, and turn it on again.": "data off, data on",
    "Please confirm the following:\n- Airplane mode: OFF\n- Mobile data: ON": "airplane check, data check",
    "**Mobile Data:** Make sure it's turned on.\n**Data Saver:** Make sure it's turned off.": "data on, saver off",
    "**Data Saver** – turn it off.\n**VPN** – disconnect it.": "saver off, vpn off",
    "Can you try toggling airplane mode on and off?": "airplane on, airplane off",
    "Please swap to 5G in the network mode settings.": "mode do",
    "Please set it to 4G or 5G, not 2G or 3G.": "mode do",
    "Switch off the VPN please, then carry out a speed test.": "vpn off, speed check",
    "Would it be possible for you to turn off the VPN?": "vpn off",
    "Can you get out of airplane mode?": "airplane off",
    "Could you take your SIM out and pop it back in?": "sim do",
    "Please check the SIM tray and make sure the SIM card is seated correctly.": "sim check",
    "What is the status of your SIM card?": "sim check",
    "Can you try again now?": "resolved check",
    "Please try to use your mobile data again.": "data check",
    "I'm sorry to hear that. Let me look into it.": "",
    "Please hold on.": "",
    "Thanks for your patience!": "",
    "Is there anything else I can do for you today?": "resolved check",
    "Have a great day!": "",
    (
        "1. **Mobile Data**: Check if it's enabled.\n"
        "2. **Data Roaming**: Check if it's enabled.\n"
        "3. **Data Saver**: Check that it's disabled."
    ): "data check, roaming check, saver check",
    (
        "* **Airplane Mode:** If it's on, please turn it off.\n"
        "* **Mobile Data:** Please check if it's on.\n"
        "* **Data Saver:** If it's on, please turn it off."
    ): "airplane off, data check, saver off",
    (
        "1. **Airplane Mode**: Is it on? If yes, please turn it off.\n"
        "2. **Mobile Data**: Is it on? If not, please turn it on.\n"
        "3. **Data Saver**: Is it on? If yes, please turn it off."
    ): "airplane off, data on, saver off",
    (
        "1. **Mobile Data**: Turn it on.\n"
        "2. **Data Roaming**: Turn it on.\n"
        "3. **Data Saver**: Turn it off.\n"
        "4. **VPN**: If you're connected, disconnect it.\n"
        "5. **Network Mode**: Set it to 4G/5G preferred."
    ): "data on, roaming on, saver off, vpn off, mode do",
    (
        "Please do this:\n"
        "\n"
        "1. **Mobile Data** - make sure it's turned on\n"
        "2. **Data Saver** – make sure it's turned off\n"
        "3. VPN: Make sure it's disconnected."
    ): "data on, saver off, vpn off",
    (
        "1. **Wi-Fi Calling**: If it's on, please turn it off.\n"
        "2. **APN settings**: Check that the MMSC URL is set. If not, reset the APN settings and reboot your phone.\n"
        "3. **App permissions**: Make sure that the messaging app has permission for storage and SMS.\n"
        "\n"
        "Let me know the outcome of each!"
    ): "wifi_calling off, apn check, apn do, restart do, permissions do",
    (
        "There are a few things here:\n"
        "1. **Airplane Mode is ON** – This disables all wireless connections on your phone. Please turn it **OFF**.\n"
        "2. **Mobile data is OFF** – Please go to your settings and toggle mobile data **ON**.\n"
        "3. **Data Saver is ON** – This can limit your speed. Please turn it **OFF**.\n"
        "\n"
        "After completing these steps, please run a speed test and tell me."
    ): "airplane off, data on, saver off, speed check",
    (
        "Please toggle the following settings:\n"
        "- Airplane Mode: OFF\n"
        "- Mobile Data: ON\n"
        "- Data Roaming: ON\n"
        "- Data Saver: OFF"
    ): "airplane off, data on, roaming on, saver off",
    (
        "Please apply the following settings on your phone:\n"
        "1. Airplane Mode: OFF\n"
        "2. Mobile Data: ON\n"
        "3. Data Roaming: ON\n"
        "4. Network Mode: 4G/5G preferred\n"
        "5. Data Saver: OFF"
    ): "airplane off, data on, roaming on, mode do, saver off",
    (
        "### Step 1: Airplane Mode\n"
        "Swipe down to see your quick settings. If Airplane Mode is turned on, tap it to turn it off.\n"
        "\n"
        "### Step 2: SIM card\n"
        "Go to Settings > SIM cards and check the status. Is it active, missing or locked?\n"
        "\n"
        "### Step 3: APN settings\n"
        "Check your APN settings and tell me what you see."
    ): "airplane off, sim check, apn check",
    (
        "Here is what is wrong:\n"
        "\n"
        "**1. Data Roaming**\n"
        "Currently off. Turn it on in your phone's settings.\n"
        "\n"
        "**2. App permissions**\n"
        "The messaging app has neither storage nor SMS. Please grant both.\n"
        "\n"
        "Then try sending an MMS."
    ): "roaming on, permissions do, mms check",
    (
        "Could you check:\n"
        "\n"
        "1. **Airplane Mode**\n"
        "   - Is it on?\n"
        "   - If so, turn it off.\n"
        "2. **Mobile Data**\n"
        "   - Is it on?\n"
        "   - If not, turn it on."
    ): "airplane off, data on",
    (
        "There are three things to fix:\n"
        "1. **Turn off Wi-Fi Calling** – it can interfere with MMS.\n"
        "2. **Reset your APN settings** to default, and then **reboot your phone** – this restores the MMSC URL.\n"
        "3. **Grant the storage permission** to the messaging app – it needs it to access your photos.\n"
        "\n"
        "Please do all three, and then try sending an MMS."
    ): "wifi_calling off, apn do, restart do, permissions do, mms check",
    (
        'Then check the app permissions for your messaging app: are "sms" and "storage" both allowed? If '
        "not, please allow them."
    ): "permissions do",
    (
        "Also check that your messaging app has the storage and SMS permissions, and grant any that's missing."
    ): "permissions do",
    (
        "**Please check the app permissions of your messaging app:**\n"
        "1. Does it have permission for *storage*?\n"
        "2. Does it have permission for *SMS*?\n"
        "\n"
        "If either of them is missing, please grant it, and then try sending your MMS again."
    ): "permissions do, mms check",
    "Does your messaging app have both the storage and SMS permissions? If not, please grant them.": "permissions do",
    (
        "Check the storage and SMS permissions of the messaging app. If any are missing, please grant them."
    ): "permissions do",
    "**App permissions**: Does the messaging app have storage and SMS? If not, please grant them.": "permissions do",
    (
        "can you confirm that both the SMS and storage permissions are now granted to the messaging app, "
        "and that mobile data is on?"
    ): "permissions check, data check",
    "Can you confirm that the storage and SMS permissions are both granted?": "permissions check",
    (
        "Two settings need to be fixed on your phone:\n"
        "\n"
        "- **Mobile Data** is off → please switch it on\n"
        "- **Data Roaming** is off → please switch it on"
    ): "data on, roaming on",
    (
        "Here's what we need to fix: mobile data is off, and Data Saver is on. Please turn mobile data on "
        "and Data Saver off."
    ): "data on, saver off",
    "Is your network mode set to 2G or 3G? If yes, please change it to 4G/5G preferred.": "mode do",
    "3. **Network Mode**: Is it 2G or 3G? → If yes, please set it to 4G/5G preferred.": "mode do",
    (
        "could you please tell me what your status bar shows? In particular, I'd like to know whether "
        "Airplane Mode is enabled. If it is, please turn it off and let me know if your service comes back."
    ): "status_bar check, airplane off, status_bar check",
    "It's $2.00 per GB for a data refuel. Would 2 GB be okay for you ($4.00 total)?": "refuel check",
    (
        "I've sent a payment request. Could you please check it and let me know if you'd like to accept it?"
    ): "payment check, payment do",
    (
        "I'm not able to lift the suspension, even if you pay the overdue bill. I'll need to transfer you "
        "to a human agent who can help. Would you like me to go ahead?"
    ): "handover check",
    "Is there anything else you'd like me to note down before I transfer you?": "note check",
    'Please select "4G/5G Preferred" instead and run another test.': "mode do, resolved check",
    (
        "Mobile data is off, and MMS won't work without it. Please turn it on and then try once more."
    ): "data on, resolved check",
    "Run another test and tell me the speed.": "resolved check",
    "Please grant it storage permission, then try sending again.": "permissions do, resolved check",
    "Airplane Mode should be off, and so should Data Saver.": "airplane off, saver off",
    "Mobile data and data roaming should both be on. Could you check that?": "data on, roaming on",
    "Both mobile data and data roaming should be on": "data on, roaming on",
    (
        "As a next step, I'd like you to check the network status: is Airplane Mode off, is Mobile Data "
        "on, and is Data Roaming on? Please correct whichever isn't right."
    ): "network check, airplane off, data on, roaming on",
    "The charge of $4.00 will be added to your next bill.": "",
    "it might help to turn off the VPN": "vpn off",
    (
        "I need you to turn on Data Roaming on your phone. I also see that you've used 15.1 GB out of your "
        "15 GB plan. I can add up to 2 GB for $2.00 per GB. How much would you like to add?"
    ): "roaming on, refuel check",
    (
        "I can see that both mobile data and data roaming are off. Please turn them both on, then try to send an MMS."
    ): "data on, roaming on, mms check",
    "Mobile data and data roaming are both turned off. Please turn both on": "data on, roaming on",
    "Mobile data and data roaming are off. Could you enable both of these": "data on, roaming on",
    "Data Saver and VPN are both on, and can reduce speed. Please turn both off.": "saver off, vpn off",
    "Airplane Mode and Wi-Fi Calling are both ON. Please turn both of them OFF.": "airplane off, wifi_calling off",
    "Since both Data Saver and the VPN are active, please turn them off": "saver off, vpn off",
    (
        "check if airplane mode and data saver are both enabled. If they are, please turn them off."
    ): "airplane off, saver off",
    (
        "I noticed a few things that need to be fixed:\n"
        "\n"
        "- **Airplane Mode is ON** → please turn it **OFF**\n"
        "- **Data Roaming is OFF** → please turn it **ON**\n"
        "- **Wi-Fi Calling is ON** → please turn it **OFF**, as it can interfere with MMS"
    ): "airplane off, roaming on, wifi_calling off",
    (
        "There are two settings that need to be changed: Airplane Mode is on, and Data Roaming is off. "
        "Please turn off airplane mode and turn on data roaming."
    ): "airplane off, roaming on",
    "**Airplane Mode**: Turn OFF\n**Mobile Data**: Turn ON": "airplane off, data on",
    (
        "- Airplane Mode: turn OFF\n- Data Roaming: turn ON\n- Wi-Fi Calling: turn OFF"
    ): "airplane off, roaming on, wifi_calling off",
    (
        "Please set the following:\n- Airplane Mode: OFF\n- Mobile Data: ON\n- Data Roaming: ON"
    ): "airplane off, data on, roaming on",
    (
        "1. **Airplane Mode**: ON → Please turn it OFF\n2. **Mobile Data**: OFF → Please turn it ON"
    ): "airplane off, data on",
    (
        "1. **APN settings**: Reset to default\n"
        "2. **Reboot**: Restart your device\n"
        "3. **Test**: Try to send an MMS again"
    ): "apn do, restart do, mms check",
    (
        "On your phone, go to **Settings → Apps → Messaging → Permissions** and tell me whether "
        "**Storage** and **SMS** are allowed."
    ): "permissions check",
    "Please check whether storage and SMS are both allowed for your messaging app": "permissions check",
    (
        "Can you tell me whether the storage and SMS permissions are both granted for your messaging app?"
    ): "permissions check",
    (
        "Please check and confirm that the Storage permission and the SMS permission are both granted."
    ): "permissions check",
    (
        "I see that both the SMS and storage permissions are off. Please grant them and try sending an MMS again."
    ): "permissions do, mms check",
    "Are storage and SMS permissions granted for the messaging app? If not, please grant them.": "permissions do",
    (
        "Check the messaging app permissions: are storage and SMS granted? If not, grant them and try to send an MMS."
    ): "permissions do, mms check",
    (
        "Your messaging app needs the storage and SMS permissions. Could you check whether these are "
        "granted? If they aren't, please grant them"
    ): "permissions do",
    (
        "Look at your messaging app: does it have access to Storage and SMS? If either one is missing, "
        "please grant it and try sending an MMS again."
    ): "permissions do, mms check",
    (
        "* **Data Saver mode** (On/Off) – if it's On, turn it Off\n"
        "* **VPN connection** (Connected/Not connected) – if connected and the performance is poor, disconnect it\n"
        "* **Preferred network mode** – should be 4G/5G preferred"
    ): "saver off, vpn off, mode do",
    "Next, go to **Settings > VPN** and disconnect.": "vpn off",
    "Open your VPN app and tap Disconnect.": "vpn off",
    (
        "Please go to **Settings > Mobile Network > Access Point Names**, tap the menu and select **Reset "
        "to default**. After that, restart your phone."
    ): "apn do, restart do",
    (
        "After the payment goes through, I'll lift the suspension on your line and you'll then need to "
        "reboot your device."
    ): "",
    "After that I'll resume your line and ask you to reboot your phone.": "",
    "You'll need to reboot your phone once I've resumed the line.": "",
    "I can refuel 2 GB. To confirm: 2 GB for $4.00 total. Is that correct?": "refuel check",
    "That would be 2 GB at $2.00 per GB, so $4.00 in total. Okay?": "refuel check",
    "How is the speed now?": "speed check",
    "How's your connection now?": "speed check",
    "Try to send the picture again.": "mms check",
    "Please send your picture again.": "mms check",
    "Thanks for running the speed test. Please turn on Data Roaming, then run it again.": "roaming on, resolved check",
    "Please grant it storage access, and then try once more.": "permissions do, resolved check",
    "Please restart the device and retry.": "restart do, resolved check",
    "VPNs can reduce your speed, so please disconnect it.": "vpn off",
    "VPNs can reduce your speed. Please disconnect yours and rerun the speed test.": "vpn off, speed check",
    (
        "Did you manage to disconnect the VPN? If not, please do so now and run the speed test once more."
    ): "vpn off, speed check",
    "Resetting the APN settings should fix this. Please do so and reboot your device.": "apn do, restart do",
    (
        "Data roaming is off on your device. Since you're in France, you'll need to turn it on for mobile "
        "data and MMS to work. Could you please do that and try sending the MMS again?"
    ): "roaming on, mms check",
    "Please set the network mode to LTE/5G.": "mode do",
    (
        "Here are the settings:\n"
        "\n"
        "| Setting | Should be |\n"
        "|---|---|\n"
        "| Airplane Mode | OFF |\n"
        "| Mobile Data | ON |\n"
        "| Data Saver | OFF |\n"
        "\n"
        "Please change whatever isn't right."
    ): "airplane off, data on, saver off",
    (
        "📱 **Next steps:**\n"
        "\n"
        "✅ **Airplane Mode** – turn it OFF\n"
        "✅ **Mobile Data** – turn it ON\n"
        "✅ **VPN** – disconnect it\n"
        "\n"
        "Then run a speed test 🚀"
    ): "airplane off, data on, vpn off, speed check",
    (
        "1️⃣ **Airplane Mode**: Please make sure it's OFF.\n2️⃣ **Data Roaming**: Please make sure it's ON."
    ): "airplane off, roaming on",
    (
        "### 1. Check Airplane Mode\n"
        "- Open **Settings > Network & Internet**\n"
        "- If **Airplane Mode** is ON, switch it OFF\n"
        "\n"
        "### 2. Check Data Roaming\n"
        "- If it's OFF, switch it ON\n"
        "\n"
        "### 3. Test\n"
        "- Run a speed test"
    ): "airplane off, roaming on, speed check",
    (
        "**Step 1 – SIM card**\n"
        "Remove the SIM card, wait 10 seconds, and put it back in.\n"
        "\n"
        "**Step 2 – Restart**\n"
        "Restart your phone.\n"
        "\n"
        "**Step 3 – Status**\n"
        "Tell me what the status bar shows."
    ): "sim do, restart do, status_bar check",
    (
        "**Network Mode:** It's on 2G only, which is too slow for MMS. Change it to 4G/5G preferred.\n"
        "**Wi-Fi Calling:** It's on, which can interfere with MMS. Turn it off."
    ): "mode do, wifi_calling off",
    (
        "- **Wi-Fi Calling**: it may interfere with MMS, so disable it if it's enabled.\n"
        "- **Messaging app permissions**: storage and SMS must both be allowed; grant whichever is missing."
    ): "wifi_calling off, permissions do",
    (
        "1. Is **Airplane Mode** on or off?\n"
        "2. Is **Mobile Data** on or off?\n"
        "3. Is **Data Saver** on or off?\n"
        "4. Are you connected to a **VPN**?"
    ): "airplane check, data check, saver check, vpn check",
    (
        "a) **APN settings** – reset them to default.\n"
        "b) **Restart** – reboot the phone.\n"
        "c) **MMS** – try to send one."
    ): "apn do, restart do, mms check",
    (
        "Please check these settings: (1) Airplane Mode – should be OFF, (2) Mobile Data – should be ON, "
        "(3) Data Saver – should be OFF."
    ): "airplane off, data on, saver off",
    (
        "* Data Saver: if enabled, disable it.\n"
        "* VPN: if connected, disconnect.\n"
        "* Network mode: if 2G/3G, switch to 4G/5G."
    ): "saver off, vpn off, mode do",
    (
        "**What I found:**\n"
        "- ❌ Airplane Mode is ON\n"
        "- ❌ Data Roaming is OFF\n"
        "\n"
        "**What to do:**\n"
        "1. Turn Airplane Mode OFF\n"
        "2. Turn Data Roaming ON"
    ): "airplane off, roaming on",
    (
        "Thanks! Two problems:\n"
        "\n"
        "1. Data Saver is ON.\n"
        "2. Network mode is 3G only.\n"
        "\n"
        "Please turn Data Saver off and change the network mode to 4G/5G preferred."
    ): "saver off, mode do",
    "Good news: your SIM is active. Bad news: Mobile Data is off. Could you enable it, please?": "data on",
    (
        "- **SIM card**: Is it active? If it's missing, reseat it.\n"
        "- **APN**: Is the MMSC URL set? If not, reset the APN settings and restart the phone."
    ): "sim do, apn check, apn do, restart do",
    (
        "Let's go step by step.\n"
        "\n"
        "**Step 1:** Check whether airplane mode is on.\n"
        "**Step 2:** If it is, turn it off.\n"
        "**Step 3:** Check your signal."
    ): "airplane off, status_bar check",
    (
        "Could you do me a favor and flip Data Saver off, flip roaming on, and give me a fresh speed test?"
    ): "saver off, roaming on, speed check",
    (
        "I'd like you to check two things: is the VPN connected, and is Data Saver active? If either is "
        "on, please turn it off."
    ): "vpn off, saver off",
    (
        "If Airplane Mode is ON, please turn it OFF. If Mobile Data is OFF, please turn it ON. Once done, "
        "let me know what you see in the status bar."
    ): "airplane off, data on, status_bar check",
    (
        "Please verify that:\n• Airplane Mode is OFF\n• Mobile Data is ON\n• Data Roaming is ON"
    ): "airplane check, data check, roaming check",
    (
        "Please ensure the following:\n"
        "• Airplane Mode is OFF\n"
        "• Mobile Data is ON\n"
        "• Data Roaming is ON\n"
        "• Data Saver is OFF"
    ): "airplane off, data on, roaming on, saver off",
    (
        "1. **Airplane Mode**\n"
        "   Make sure it is turned off.\n"
        "2. **SIM Card**\n"
        "   Remove it and insert it again.\n"
        "3. **Restart**\n"
        "   Then restart your phone."
    ): "airplane off, sim do, restart do",
    (
        "Your line's suspended because of an unpaid bill ($65). I can send a payment request to your phone – shall I?"
    ): "payment agree",
    (
        "I've just sent over the request for $65.00. Kindly look at it on your phone and, if you're happy "
        "with the amount, accept it."
    ): "payment check, payment do",
    "You've hit your data cap. Adding 2 GB would cost $4.00. Should I go ahead and add it?": "refuel check",
    "Would adding 2 GB for $4.00 work for you?": "refuel check",
    (
        "Unfortunately, I can't fix a locked SIM card from here, so I'd have to transfer you to a human "
        "agent. Is that alright?"
    ): "handover check",
    (
        "Hi John! Your line is active and your bill is paid, so let's look at the phone. What does the "
        "status bar show?"
    ): "status_bar check",
    (
        "Could you check whether your phone is in airplane mode? If it is, please disable it. Also, please "
        "check your SIM card's status."
    ): "airplane off, sim check",
    (
        "Thanks for checking. Your SIM is missing – please remove it and insert it again. Then tell me "
        "whether you have signal."
    ): "sim do, status_bar check",
    (
        "**Troubleshooting steps**\n"
        "\n"
        "| Step | What to do |\n"
        "|---|---|\n"
        "| 1 | Turn off Airplane Mode |\n"
        "| 2 | Re-seat the SIM card |\n"
        "| 3 | Restart the phone |"
    ): "airplane off, sim do, restart do",
    (
        "Let's start with the basics:\n"
        "\n"
        "- Is **Airplane Mode** turned off?\n"
        "- Is your **SIM card** inserted properly?\n"
        "- What does your **signal** look like?"
    ): "airplane check, sim check, status_bar check",
    (
        "## Quick checks\n"
        "1. **Airplane mode** – on or off?\n"
        "2. **Mobile data** – on or off?\n"
        "3. **Data roaming** – on or off?"
    ): "airplane check, data check, roaming check",
    (
        "I see two issues.\n"
        "\n"
        "**Issue 1: Data Saver is on**\n"
        "Please turn it off.\n"
        "\n"
        "**Issue 2: VPN is connected**\n"
        "Please disconnect it.\n"
        "\n"
        "Once you've done both, please run a speed test."
    ): "saver off, vpn off, speed check",
    (
        "Please do the following in order:\n"
        "1. Open Settings.\n"
        '2. Go to "Network & Internet".\n'
        '3. Turn off "Data Saver".\n'
        '4. Turn off "VPN".\n'
        "5. Run a speed test."
    ): "saver off, vpn off, speed check",
    (
        "Your messaging app doesn't have the storage permission. Could you grant it and then try to send an MMS?"
    ): "permissions do, mms check",
    (
        "To send MMS, the messaging app needs two permissions: **SMS** and **storage**. Please make sure "
        "both are granted."
    ): "mms check, permissions do",
    "Go to **Settings > Apps > Messaging > Permissions**:\n- **SMS**: allow\n- **Storage**: allow": "permissions do",
    (
        "The APN settings look incorrect. Let's reset them: go to Settings > Mobile Network > Access Point "
        "Names > Reset to default. Then restart your phone."
    ): "apn check, apn do, restart do",
    "Have you tried restarting the phone? If not, please do that now.": "restart do",
    (
        "Wi-Fi Calling can cause problems with MMS. Is it enabled on your phone? If so, please turn it off "
        "and try sending the picture again."
    ): "wifi_calling off, mms check",
    (
        "Since you are in France, roaming must be on. I have enabled it on your line; please enable Data "
        "Roaming on your phone as well."
    ): "roaming on",
    (
        "Do you see the airplane icon in your status bar? If so, please tap it to turn airplane mode off."
    ): "status_bar check, airplane off",
    (
        "Please open the status bar and check:\n• whether the airplane icon is shown\n• how many signal bars you have"
    ): "airplane check, status_bar check",
    "Mobile data: please turn it on. Data roaming: please leave it off.": "data on, roaming off",
    (
        "Everything looks fine on my side, so the cause must be on the phone. Can you check your network "
        "mode? If it says 2G or 3G, switch it to 4G/5G."
    ): "mode do",
    "Perfect. Let me know once the phone has restarted and whether you have signal.": "restart do, status_bar check",
    (
        "Step 1: Turn Airplane Mode off\nStep 2: Turn Mobile Data on\nStep 3: Run a speed test and tell me the result"
    ): "airplane off, data on, speed check",
    "Please turn these off: Airplane Mode, Data Saver, VPN.": "airplane off, saver off, vpn off",
    "These need to be ON: Mobile Data, Data Roaming.": "data on, roaming on",
    "These should be off:\n- Airplane Mode\n- Data Saver": "airplane off, saver off",
    (
        "- Turn **OFF**: Airplane Mode, Data Saver\n- Turn **ON**: Mobile Data, Data Roaming"
    ): "airplane off, saver off, data on, roaming on",
    (
        "1. **Turn off:**\n   - Airplane Mode\n   - Data Saver\n2. **Turn on:**\n   - Mobile Data"
    ): "airplane off, saver off, data on",
    (
        "Settings to verify:\n* Airplane Mode → OFF\n* Mobile Data → ON\n* Wi-Fi Calling → OFF"
    ): "airplane check, data check, wifi_calling check",
    (
        "I'd suggest two changes: first, set the preferred network mode to 4G/5G; second, switch off Wi-Fi Calling."
    ): "mode do, wifi_calling off",
    "Could you check your VPN? It should be disconnected.": "vpn off",
    "Please re-check: is airplane mode off now?": "airplane check",
    "That's great to hear! Is there anything else I can help you with today?": "resolved check",
    (
        "I understand how frustrating this is. I've checked your account and everything is in order. Next, "
        "please restart your phone."
    ): "restart do",
    "Please share a screenshot... just kidding! Simply tell me what your network mode is.": "mode check",
    "Before we go on: is mobile data on?": "data check",
    "Please turn on mobile data; once it's on, run a speed test.": "data on, speed check",
    "After you turn off Airplane Mode, check if Mobile Data is ON. If it's not, turn it on.": "airplane off, data on",
    (
        "Please check the following settings and change them if needed:\n"
        "1. **Airplane Mode** should be OFF.\n"
        "2. **Mobile Data** should be ON.\n"
        "3. **Network Mode** should be 4G/5G preferred."
    ): "airplane off, data on, mode do",
    "Let me know if you'd like me to add 2 GB of data for $4.00.": "refuel check",
    (
        "Would you be willing to pay the $65.00 bill now? If yes, I'll send a payment request to your phone."
    ): "payment do",
    (
        "Please run the following checks and share the results:\n"
        "\n"
        "1. **Network status** – signal, network type (2G/3G/4G/5G), mobile data, data roaming\n"
        "2. **SIM card status**\n"
        "3. **APN settings** – specifically whether the MMSC URL is set\n"
        "4. **Wi-Fi Calling status**\n"
        "5. **Messaging app permissions** – whether storage and SMS permissions are granted"
    ): (
        "network check, status_bar check, mode check, data check, roaming check, sim check, apn check, "
        "wifi_calling check, permissions check"
    ),
    "Do you have signal now? What about MMS – can you send one?": "status_bar check, mms check",
    "I've added 2 GB to your line for $4.00. Please check your speed now.": "speed check",
    (
        "Please look at these and report back:\n\n- Airplane Mode\n- Mobile Data\n- Data Saver"
    ): "airplane check, data check, saver check",
    (
        "1. Airplane Mode: make sure it is off\n2. Mobile Data: make sure it is on\n3. Restart your phone"
    ): "airplane off, data on, restart do",
    (
        "**Airplane Mode** is currently on. Please turn it off first. **Mobile Data** is off as well. "
        "Please turn it on."
    ): "airplane off, data on",
    "Your phone is on 3G. For MMS, please set it to 4G/5G preferred.": "mode do",
    (
        "Please turn off the Wi-Fi Calling feature and, after that, reset the APN settings and restart."
    ): "wifi_calling off, apn do, restart do",
    "The VPN is still connected, isn't it? Please disconnect it.": "vpn off",
    "Ok great, so airplane mode is off. What about mobile data, is that on?": "data check",
    "Nothing is wrong with the SIM, so leave it in. Just turn roaming on.": "sim check, roaming on",
    'Please go ahead and toggle both "Mobile Data" and "Data Roaming" ON.': "data on, roaming on",
    "Turn OFF Airplane Mode → Turn ON Mobile Data → Run a speed test": "airplane off, data on, speed check",
    "Please do NOT turn on Airplane Mode. Just tell me whether it's on.": "airplane check",
    (
        "Everything on the account is fine. Could you try restarting your phone and then see if the signal is back?"
    ): "restart do, status_bar check",
    "Please check whether your SIM card is seated properly; if it isn't, re-seat it.": "sim do",
    (
        'Please disable "Data Saver", since it may be limiting your mobile data, and then retest your speed.'
    ): "saver off, speed check",
    "Thanks for checking. Now please do the same for Data Roaming: turn it on.": "roaming on",
    "Airplane Mode: OFF ✅\nMobile Data: OFF ❌ – please turn it on": "data on",
    "Your settings:\n- Airplane mode: off ✅\n- Data Saver: on ❌\n\nPlease turn off Data Saver.": "saver off",
    (
        "Great, thanks for the update! So far:\n"
        "- Airplane mode: off\n"
        "- SIM: active\n"
        "- Mobile data: off\n"
        "\n"
        "Please turn mobile data on."
    ): "data on",
}
